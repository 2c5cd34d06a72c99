"""A sparse codec that handles several large leaves together without copying them.

Stacking large leaves would copy them. Here each leaf is only read, to choose what is sent, and
written, to add values at their positions. Everything small (messages, indices and values) is
stacked, and one program makes it for all leaves of the same size. The message of each leaf is the
same as without its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ef_optax._core.joinable import JointCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.workers import Workers
from ef_optax._numeric import offsets
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_of
from ef_optax._numeric.shapes import like_of
from ef_optax.compressors.sparse import _sparse

Parts = tuple[Array, Array]  # indices and values of the leaves of one size, a row for each leaf


@dataclasses.dataclass(frozen=True)
class JointSparse(JointCodec):
    """``inner`` on each of a list of leaves of one family."""

    inner: _sparse.SparseCodec

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        rows = offsets.as_data(range(len(x)), workers.step)
        groups = _sparse.by_size(x)
        likes = [like_of(x[members[0]]) for members in groups]
        messages = self.inner.encode_each(x, rows)
        finite = all_of([self.inner.finite(None, message) for message in messages])
        gathered: Gathered = yield Gather(messages, finite)

        def own_parts(message: Message, like: jax.ShapeDtypeStruct) -> Parts:
            return jax.vmap(lambda one: self.inner.parts(one, like))(message)

        def mean_parts(message: Message, like: jax.ShapeDtypeStruct) -> Parts:
            def of_one(leaf: Message) -> Parts:
                return self.inner.contributions(leaf, like, gathered.weights, gathered.total)

            return jax.vmap(of_one, in_axes=1)(message)

        def each(function: Callable[..., Array], parts: Any, messages: Sequence[Message]) -> Any:
            results: dict[int, Array] = {}
            for members, like, message in zip(groups, likes, messages, strict=True):
                arrays = parts(message, like)
                for row, i in zip(rows, members, strict=False):
                    own = [offsets.row(a, row) for a in arrays]
                    results[i] = function(x[i], *own)
            return [results[i] for i in range(len(x))]

        def decoded(x: Array, indices: Array, values: Array) -> Array:
            return _sparse.scatter(values.reshape(-1), indices.reshape(-1), like_of(x))

        return Outcome(
            aggregate=each(decoded, mean_parts, gathered.messages),
            state=state,
            sent=lambda: each(decoded, own_parts, messages),
            residual=lambda: each(_sparse.subtract_at, own_parts, messages),
            support=lambda: each(_sparse.mask_at, own_parts, messages),
        )
