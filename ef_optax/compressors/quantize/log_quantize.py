"""Logarithmic quantisation: the sign and the rounded exponent."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._numeric.norms import leaf_norm
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class LogQuantize(Codec):
    """The sign and the nearest power of two, by its logarithm, among the 2^width - 1 largest."""

    width: int

    @property
    def traits(self) -> Traits:
        return Traits(basis="bound")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1).astype(scale_dtype(x.dtype))
        largest = leaf_norm(flat, "linf")
        top = _rounded_exponent(largest)
        code = jnp.maximum(_rounded_exponent(flat) - top + 2**self.width - 1, 0)
        code = jnp.where(flat == 0, 0, code)
        negative = jnp.where((flat < 0) & (code > 0), 2**self.width, 0)
        one = jnp.ones((), flat.dtype)
        power = jnp.where(largest == 0, jnp.zeros((), flat.dtype), jnp.ldexp(one, top))
        return {"codes": fields.pack(code + negative, self.width + 1), "top": power[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self.width + 1, size_of(like.shape))
        code = (codes & jnp.uint32(2**self.width - 1)).astype(jnp.int32)
        top = message["top"][0]
        fraction, bias, integer = _layout(top.dtype)
        power = (code.astype(integer) - (2**self.width - 1) + bias) << fraction  # its bit pattern
        magnitude = top * jax.lax.bitcast_convert_type(power, top.dtype)
        magnitude = jnp.where(code == 0, jnp.zeros((), top.dtype), magnitude)
        values = jnp.where(codes >> self.width == 1, -magnitude, magnitude)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * (self.width + 1) + bits_of(scale_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """(1 - c)/(1 + (d - 1) t^2), with c the rounding error and t the share that becomes 0."""
        del num_workers
        rounding = (math.sqrt(2) - 1) ** 2
        least = 2.0 ** (2 - 2**self.width)
        return (1 - rounding) / (1 + (max(1, size_of(shape)) - 1) * least**2)


def _rounded_exponent(x: Array) -> Array:
    """round(log2 |x|) as int32: the exponent, plus one if the mantissa is above sqrt 2.

    It is computed from the bits, where the carry of a sum does the rounding. Denormals are first
    multiplied by a power of two.
    """
    fraction, bias, integer = _layout(x.dtype)
    low = jnp.abs(x) < jnp.finfo(x.dtype).smallest_normal
    raised = jnp.where(low, x * x.dtype.type(2.0 ** (fraction + 1)), x)
    round_up = 2 ** (fraction + 1) - 1 - math.floor(math.sqrt(2) * 2**fraction)
    exponent = (magnitude_order(raised) + np.asarray(round_up, integer)) >> fraction
    return exponent.astype(jnp.int32) - bias - jnp.where(low, fraction + 1, 0)


def _layout(dtype: Any) -> tuple[int, int, Any]:
    """Bits of the mantissa, bias of the exponent, and the integer dtype of the same width."""
    info = jnp.finfo(dtype)
    return info.nmant, info.maxexp - 1, jnp.dtype(f"int{info.bits}")


def log_quantize(bits: int) -> Compressor:
    """Signs and powers of two: log2 of the magnitude is rounded to nearest.

    ``C(x) = sign(x) 2^e`` with ``e = round(log2 |x|)``, for the 2^bits - 1 powers from the largest
    e of the leaf downwards; smaller values become 0. alpha = (1 - c)/(1 + (d-1) t^2), with
    c = (sqrt 2 - 1)^2 and t = 2^(2 - 2^bits) (bound).

    Args:
      bits: bits of an exponent, 1 to 7, without the sign bit.

    Returns:
      The compressor. Bits: (bits + 1) d + 32.

    Raises:
      ValueError: for a bad ``bits``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.log_quantize(2)
      >>> compressor.update(jnp.array([9.0, -5.8, 1.5, 0.3]), compressor.init(None))[0].tolist()
      [8.0, -8.0, 2.0, 0.0]

    References:
      Miyashita, Lee, Murmann, Convolutional neural networks using logarithmic data
      representation, 2016, section 3, with the range of each leaf.
    """
    check.count("log_quantize", "bits", bits, least=1, most=7)
    return Compressor(LogQuantize(bits))
