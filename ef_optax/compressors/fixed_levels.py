"""Fixed levels that ignore the size of the gradient: MXNet's one-bit and two-bit codes.

They make sense only inside error feedback, which saves up what is below the threshold.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check, _fields
from ef_optax._base import Array, Codec, Message, Shape, size_of
from ef_optax._compressor import Compressor


@dataclasses.dataclass(frozen=True)
class ThresholdSign(Codec):
    """+1 where x > threshold, else -1."""

    threshold: float
    homogeneous: ClassVar[bool] = False

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        above = x.reshape(-1) > jnp.asarray(self.threshold, x.dtype)
        return _fields.pack(above.astype(jnp.uint32), 1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return _fields.unpack_signs(message, size_of(like.shape), like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return size_of(shape)


@dataclasses.dataclass(frozen=True)
class TwoBit(Codec):
    """``t`` where x >= t, ``-t`` where x <= -t, else 0."""

    threshold: float
    homogeneous: ClassVar[bool] = False

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat, t = x.reshape(-1), jnp.asarray(self.threshold, x.dtype)
        code = jnp.where(flat >= t, jnp.uint32(2), jnp.where(flat <= -t, jnp.uint32(1), 0))
        return _fields.pack(code, 2)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        code = _fields.unpack(message, 2, size_of(like.shape))
        t, zero = jnp.asarray(self.threshold, like.dtype), jnp.zeros((), like.dtype)
        return jnp.where(code == 2, t, jnp.where(code == 1, -t, zero)).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return 2 * size_of(shape)


def threshold_sign(threshold: float = 0.0) -> Compressor:
    """MXNet's one-bit code: +1 where x > threshold, else -1; no scale.

    Neither contractive nor homogeneous, and a leaf of zeros becomes -1 everywhere (for a threshold
    >= 0): the learning rate is the only scale. Use it inside error feedback.

    Args:
      threshold: any finite number.

    Returns:
      The compressor. Bits: d.

    Raises:
      ValueError: if ``threshold`` is not a finite number.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.threshold_sign(0.5)
      >>> compressor.update(jnp.array([0.7, 0.5, -2.0]), compressor.init(None))[0].tolist()
      [1.0, -1.0, -1.0]

    References:
      Apache MXNet, gradient compression of the key-value store ("1bit").
    """
    _check.static("threshold_sign", "threshold", threshold, math.isfinite, "a finite number")
    return Compressor(ThresholdSign(float(threshold)))


def two_bit(threshold: float = 0.5) -> Compressor:
    """MXNet's two-bit code: ``t`` where x >= t, ``-t`` where x <= -t, else 0.

    The error is never longer than x, but there is no contraction constant (below the threshold
    nothing is sent) and it is not homogeneous. Use it inside error feedback, which
    saves small values up until they reach the threshold.

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
    _check.static_positive("two_bit", "threshold", threshold)
    return Compressor(TwoBit(float(threshold)))
