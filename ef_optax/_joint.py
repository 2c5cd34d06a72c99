"""Several large leaves as one: encoded together where they lie, then treated one by one.

Stacking large leaves would copy them. A codec whose work on a leaf soon shrinks to something small
says so by ``family``, and does the small part for all leaves of a family at once (``encode_each``).
Each leaf's message is the one that it would have alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from ef_optax import _places
from ef_optax._base import (
    Array,
    Codec,
    Gather,
    Gathered,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    all_of,
    like_of,
)


@dataclasses.dataclass(frozen=True)
class Joint(Codec):
    """``inner`` on each of a list of leaves of one family."""

    inner: Codec
    granularity: ClassVar[str] = "group"

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        rows = _places.as_data(range(len(x)), workers.step)
        messages = self.inner.encode_each(x, rows)
        verdicts = [self.inner.finite(*pair) for pair in zip(x, messages, strict=True)]
        gathered: Gathered = yield Gather(messages, all_of(verdicts))
        weights, total = gathered.weights, gathered.total

        def each(function: Any, *arguments: Sequence[Any]) -> list[Any]:
            return [function(*own) for own in zip(*arguments, strict=True)]

        likes = each(like_of, x)
        return Outcome(
            aggregate=each(
                lambda m, like: self.inner.decode_mean(m, like, weights, total),
                gathered.messages,
                likes,
            ),
            state=state,
            sent=lambda: each(self.inner.decode, messages, likes),
            residual=lambda: each(self.inner.residual, x, messages),
            support=lambda: each(self.inner.support, x, messages),
        )

    def encode(self, x: Any, key: Array | None = None) -> Message:
        raise AssertionError("leaves of a family are encoded by their protocol")

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        raise AssertionError("leaves of a family are decoded one by one")

    def bits(self, shape: Shape, dtype: Any = None) -> int:
        raise AssertionError("a family is never asked for bits; its leaves' codec is")
