"""A plain Optax transformation as a compressor with a dense message."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean, Message
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """A stateless Optax transformation of all its leaves together, whose output travels dense."""

    tx: optax.GradientTransformation

    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False, granularity="group")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return self._apply([x])[0]

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * bits_of(dtype)

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        del workers
        sent = self._apply(x)
        mean = yield Mean(sent)
        return Outcome(
            aggregate=mean,
            state=state,
            sent=lambda: sent,
            residual=lambda: [a - b for a, b in zip(x, sent, strict=True)],
            support=lambda: [jnp.ones(a.shape, bool) for a in x],
        )

    def _apply(self, leaves: list[Array]) -> list[Array]:
        updates: Any = self.tx.update(leaves, self.tx.init(leaves), None)[0]
        return updates


def dense(tx: optax.GradientTransformation) -> Compressor:
    """Uses a plain, stateless Optax transformation as a compressor with a dense message.

    ``C(updates) = tx.update(updates)``, with all leaves together. It saves nothing on the wire, so
    it has to be asked for. It makes a "compressor" of clipping, as Clip21 needs.

    Args:
      tx: a transformation without state, such as ``optax.clip(1.0)``.

    Returns:
      The compressor; its message is the dense array, exchanged by an all-reduce.

    Raises:
      TypeError: if ``tx`` is not a transformation, or is already a compressor.
      ValueError: if ``tx`` has state.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> clip = ef.dense(optax.clip(1.0))
      >>> clip.update(jnp.array([5.0, -0.5]), clip.init(None))[0].tolist()
      [1.0, -0.5]
    """
    if isinstance(tx, Compressor) or not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"dense: tx={tx!r} must be a plain Optax transformation.")
    if jax.tree.leaves(jax.eval_shape(tx.init, [jax.ShapeDtypeStruct((1,), jnp.float32)])):
        raise ValueError("dense: tx has state; put it into the chain before or after instead.")
    return Compressor(Dense(tx))
