"""1-bit quantisation by a fixed threshold (MXNet)."""

from __future__ import annotations

import dataclasses
import math
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
class ThresholdSign(Codec):
    """+1 if x > threshold, else -1."""

    threshold: float

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        above = x.reshape(-1) > jnp.asarray(self.threshold, x.dtype)
        return fields.pack(above.astype(jnp.uint32), 1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return fields.unpack_signs(message, size_of(like.shape), like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return size_of(shape)


def threshold_sign(threshold: float = 0.0) -> Compressor:
    """MXNet's one-bit code: +1 if x > threshold, else -1, without a scale.

    It is neither contractive nor homogeneous, and a leaf of zeros becomes -1 everywhere (for a
    threshold >= 0). The learning rate is the only scale. Use it inside error feedback.

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
    check.static("threshold_sign", "threshold", threshold, math.isfinite, "a finite number")
    return Compressor(ThresholdSign(float(threshold)))
