"""2-bit quantisation by a fixed threshold (MXNet)."""

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
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class TwoBit(Codec):
    """``t`` if x >= t, ``-t`` if x <= -t, else 0."""

    threshold: float

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat, t = x.reshape(-1), jnp.asarray(self.threshold, x.dtype)
        code = jnp.where(flat >= t, jnp.uint32(2), jnp.where(flat <= -t, jnp.uint32(1), 0))
        return fields.pack(code, 2)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        code = fields.unpack(message, 2, size_of(like.shape))
        t, zero = jnp.asarray(self.threshold, like.dtype), jnp.zeros((), like.dtype)
        return jnp.where(code == 2, t, jnp.where(code == 1, -t, zero)).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return 2 * size_of(shape)


def two_bit(threshold: float = 0.5) -> Compressor:
    """MXNet's two-bit code: ``t`` if x >= t, ``-t`` if x <= -t, else 0.

    The error is never longer than x, but there is no contraction constant, because nothing below
    the threshold is sent. It is not homogeneous. Use it inside error feedback, which accumulates
    small values until they reach the threshold.

    Args:
      threshold: t > 0.

    Returns:
      The compressor. Bits: 2 d.

    Raises:
      ValueError: if ``threshold`` is not a positive number.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.two_bit(0.5)
      >>> compressor.update(jnp.array([0.7, 0.4, -0.5]), compressor.init(None))[0].tolist()
      [0.5, 0.0, -0.5]

    References:
      Strom, Scalable distributed DNN training using commodity GPU cloud computing, 2015;
      Apache MXNet, gradient compression of the key-value store ("2bit").
    """
    check.static_positive("two_bit", "threshold", threshold)
    return Compressor(TwoBit(float(threshold)))
