"""A leaf is sent with probability p, or not at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Bernoulli(Codec):
    """The whole leaf with probability p, else nothing."""

    key: Array
    p: float
    scaled: bool = True

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.scaled, linear=True, deterministic=False, basis="exact")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        sent = jax.random.bernoulli(key, self.p)
        factor = 1 / self.p if self.scaled else 1.0
        values = jnp.where(sent, x * jnp.asarray(factor, x.dtype), jnp.zeros((), x.dtype))
        return {
            "sent": fields.pack(sent.astype(jnp.uint32)[None], 1),
            "values": values.reshape(-1),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message["values"].astype(like.dtype).reshape(like.shape)

    def support(self, x: Array, message: Message) -> Array:
        sent = fields.unpack(message["sent"], 1, 1) == 1
        return jnp.broadcast_to(sent, x.size).reshape(x.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 1 + size_of(shape) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del shape, num_workers
        return None if self.scaled else self.p

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del shape, num_workers
        return 1 / self.p - 1 if self.scaled else None

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """If scaled, the variance, which is the same for every input."""
        return self.omega(shape, num_workers) or 0.0


def bernoulli(p: float, key: Any = None, *, scaled: bool = True) -> Compressor:
    """Lazy sending: the whole leaf with probability p, else nothing.

    ``C(x) = x/p`` with probability p, else 0 (omega = 1/p - 1, exact), or ``x`` instead of ``x/p``
    if not ``scaled`` (alpha = p in expectation, exact). Leaves and workers draw independently.

    Args:
      p: probability in (0, 1].
      key: a JAX random key or an int; step, leaf and worker are folded in.
      scaled: divide by p to make it unbiased. Use False under error feedback.

    Returns:
      The compressor. Bits: 1 + 32 d travel, since shapes are fixed; the *information*, which papers
      count, is 1 + 32 p d on average.

    Raises:
      ValueError: if p is not in (0, 1]. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.bernoulli(0.25, key=0).codec.omega(100)
      3.0

    References:
      Khirirat, Feyzmahdavian, Johansson, Distributed learning with compressed gradients, 2018;
      Richtarik et al., 3PC, 2022 (lazy aggregation).
    """
    check.static("bernoulli", "p", p, lambda p: 0 < p <= 1, "a probability in (0, 1]")
    check.flag("bernoulli", "scaled", scaled)
    return Compressor(Bernoulli(as_key(key, "bernoulli"), float(p), scaled))
