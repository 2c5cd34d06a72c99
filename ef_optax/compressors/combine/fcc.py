"""FCC, fast compressed communication (Huang et al. 2022): R compressions of what is still missing.

v = 0 ;  R times: v = v + C(x - v)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Repeated(Codec):
    """R messages of one codec, each for what the ones before it left out."""

    inner: Codec
    rounds: int

    @property
    def traits(self) -> Traits:
        return Traits(
            homogeneous=self.inner.homogeneous,
            deterministic=self.inner.deterministic,
            basis=common(self.inner.traits).basis,
        )

    def step_key(self, workers: Workers) -> Any:
        return self.inner.step_key(workers)

    def encode(self, x: Array, key: Any = None) -> Message:
        messages = []
        for r in range(self.rounds):
            own = key if key is None or r == 0 else jax.tree.map(lambda k: _fold(k, r), key)  # noqa: B023
            messages.append(self.inner.encode(x, own))
            x = self.inner.residual(x, messages[-1])
        return tuple(messages)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        parts = [self.inner.decode(one, like) for one in message]
        return sum(parts[1:], parts[0])

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        parts = [self.inner.decode_mean(one, like, weights, total) for one in messages]
        return sum(parts[1:], parts[0])

    def residual(self, x: Array, message: Message) -> Array:
        for one in message:
            x = self.inner.residual(x, one)
        return x

    def support(self, x: Array, message: Message) -> Array:
        mask = self.inner.support(x, message[0])
        for one in message[1:]:
            mask = mask | self.inner.support(x, one)
        return mask

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.rounds * self.inner.bits(shape, dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        alpha = self.inner.alpha(shape, num_workers)
        return None if alpha is None else _repeated(alpha, self.rounds)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        return self.inner.noise_error(shape, num_workers) ** self.rounds


def _repeated(alpha: float, rounds: int) -> float:
    """1 - (1 - alpha)^R, without cancellation for small alpha."""
    return 1.0 if alpha == 1 else -math.expm1(rounds * math.log1p(-alpha))


def _fold(key: Array, r: int) -> Array:
    return jax.random.fold_in(key, r)


def fcc(compressor: Compressor, rounds: int) -> Compressor:
    """FCC: applies the compressor R times to what is still missing, and sends one message.

    ``v = 0``; R times ``v = v + C(x - v)``. The contraction is ``1 - (1 - alpha)^R``, so the error
    falls geometrically with the length of the message, whatever the compressor. FCC of top-k is
    top-Rk. :func:`neolithic` uses FCC in both directions.

    Args:
      compressor: C, a stateless compressor of single leaves, whose message one worker encodes
        alone.
      rounds: R, at least 1.

    Returns:
      The compressor. Bits: R times those of C.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves.
      ValueError: if ``rounds`` is below 1.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.fcc(ef.scaled_sign(), 2)
      >>> compressor.update(jnp.array([3.0, -1.0]), compressor.init(None))[0].tolist()
      [3.0, -1.0]

    References:
      Huang, Chen, Yin, Yuan, "Lower Bounds and Nearly Optimal Algorithms in Distributed Learning
      with Communication Compression", NeurIPS 2022.
    """
    codec = single_codec(compressor, "fcc", "compressor")
    check.count("fcc", "rounds", rounds)
    return Compressor(Repeated(codec, int(rounds)))
