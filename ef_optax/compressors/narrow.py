"""Narrow floats with a scale for each row, and a logarithmic code."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import _check, _fields
from ef_optax._base import Array, Codec, Message, Shape, bits_of, size_of
from ef_optax._compressor import Compressor
from ef_optax._rounding import rounded
from ef_optax._search import magnitude_order
from ef_optax.compressors._blocks import safe_divisor
from ef_optax.compressors._norms import block_norms, block_sums, leaf_norm, power_of_two
from ef_optax.compressors.sign import scale_dtype

FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def row_length(shape: Shape) -> int:
    """Length of the last axis; 1 for a scalar.

    >>> row_length((3, 4)), row_length(()), row_length(7)
    (4, 1, 7)
    """
    return shape if isinstance(shape, int) else (shape[-1] if shape else 1)


def row_count(shape: Shape) -> int:
    """Number of rows along the last axis; none in an empty leaf.

    >>> row_count((3, 4)), row_count(()), row_count((0,))
    (3, 1, 0)
    """
    size = size_of(shape)
    return size // row_length(shape) if size else 0


def _rows(x: Array) -> Array:
    return x.reshape(row_count(x.shape), row_length(x.shape)).astype(scale_dtype(x.dtype))


@dataclasses.dataclass(frozen=True)
class ScaledHalf(Codec):
    """Rows shifted to mean 0, scaled to standard deviation 1, and rounded to float16."""

    basis: ClassVar[str] = "bound"

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows, length = _rows(x), row_length(x.shape)
        unit = power_of_two(block_norms(rows, length, "linf"))[:, None]

        def mean_of(rows: Array) -> Array:
            return block_sums((rows,), length)[0][:, None] / length

        mean = mean_of(rows / unit) * unit
        centred = rows - mean
        deviation = unit * jnp.sqrt(mean_of(jnp.square(centred / unit)))
        limit = float(jnp.finfo(jnp.float16).max)
        values = rounded(jnp.clip(centred / safe_divisor(deviation), -limit, limit), jnp.float16)
        return {"values": values.reshape(-1), "mean": mean[:, 0], "deviation": deviation[:, 0]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        shape = row_count(like.shape), row_length(like.shape)
        mean, deviation = message["mean"][:, None], message["deviation"][:, None]
        rows = message["values"].reshape(shape).astype(mean.dtype) * deviation + mean
        return rows.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 16 * size_of(shape) + 2 * row_count(shape) * bits_of(scale_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1 - 2^-21: float16 has 11 significant bits, and the row's norm is at least its spread."""
        del shape, num_workers
        return 1 - 2.0**-21


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """Values of 8 bits, scaled so that the largest magnitude of a row is the format's largest."""

    format: str
    rows: bool = True
    basis: ClassVar[str] = "bound"

    def _largest(self) -> float:
        return float(jnp.finfo(FORMATS[self.format]).max)

    def _cut(self, x: Array) -> Array:
        return _rows(x) if self.rows else _rows(x.reshape(-1))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows, top = self._cut(x), self._largest()
        largest = block_norms(rows, rows.shape[1], "linf")[:, None]
        unit = power_of_two(largest)
        scaled = jnp.clip(rows / unit * (top / safe_divisor(largest / unit)), -top, top)
        values = rounded(scaled, FORMATS[self.format])
        return {"values": values.reshape(-1), "largest": largest[:, 0]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        largest = message["largest"][:, None]
        shape = like.shape if self.rows else size_of(like.shape)
        rows = message["values"].reshape(row_count(shape), row_length(shape))
        unit = power_of_two(largest)
        factor = self._largest() / safe_divisor(largest / unit)
        values = jnp.where(largest == 0, largest, rows.astype(largest.dtype) / factor * unit)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = row_count(shape if self.rows else size)
        return 8 * size + scales * bits_of(scale_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1 - relative error^2 - r (absolute error / largest)^2 for rows of r values."""
        del num_workers
        info = jnp.finfo(FORMATS[self.format])
        length = row_length(shape) if self.rows else max(1, size_of(shape))
        relative = 2.0 ** -(info.nmant + 1)
        absolute = float(info.smallest_subnormal) / 2
        return 1 - relative**2 - length * (absolute / self._largest()) ** 2


@dataclasses.dataclass(frozen=True)
class LogQuantize(Codec):
    """Sign and nearest power of two (on the logarithm), 2^width - 1 powers below the largest."""

    width: int
    basis: ClassVar[str] = "bound"

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
        return {"codes": _fields.pack(code + negative, self.width + 1), "top": power[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = _fields.unpack(message["codes"], self.width + 1, size_of(like.shape))
        code = (codes & jnp.uint32(2**self.width - 1)).astype(jnp.int32)
        top = message["top"][0]
        fraction, bias, integer = _layout(top.dtype)
        power = (code.astype(integer) - (2**self.width - 1) + bias) << fraction  # of two, as bits
        magnitude = top * jax.lax.bitcast_convert_type(power, top.dtype)
        magnitude = jnp.where(code == 0, jnp.zeros((), top.dtype), magnitude)
        values = jnp.where(codes >> self.width == 1, -magnitude, magnitude)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * (self.width + 1) + bits_of(scale_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """(1 - c)/(1 + (d - 1) t^2): c the error of rounding, t the share that becomes zero."""
        del num_workers
        rounding = (math.sqrt(2) - 1) ** 2
        least = 2.0 ** (2 - 2**self.width)
        return (1 - rounding) / (1 + (max(1, size_of(shape)) - 1) * least**2)


def _rounded_exponent(x: Array) -> Array:
    """round(log2 |x|), int32: the exponent, and one more if the mantissa is above sqrt 2.

    From the bits: the carry of a sum does the rounding. Denormals are raised first.
    """
    fraction, bias, integer = _layout(x.dtype)
    low = jnp.abs(x) < jnp.finfo(x.dtype).smallest_normal
    raised = jnp.where(low, x * x.dtype.type(2.0 ** (fraction + 1)), x)
    round_up = 2 ** (fraction + 1) - 1 - math.floor(math.sqrt(2) * 2**fraction)
    exponent = (magnitude_order(raised) + np.asarray(round_up, integer)) >> fraction
    return exponent.astype(jnp.int32) - bias - jnp.where(low, fraction + 1, 0)


def _layout(dtype: Any) -> tuple[int, int, Any]:
    """Bits of the mantissa, bias of the exponent, and the integer of the same width."""
    info = jnp.finfo(dtype)
    return info.nmant, info.maxexp - 1, jnp.dtype(f"int{info.bits}")


def scaled_half() -> Compressor:
    """float16 after shifting and scaling each row to mean 0 and standard deviation 1.

    Along the last axis ``y = (x - mean)/deviation`` (deviation 1 where it is 0), rounded to
    float16; ``C(x) = deviation y + mean``. alpha = 1 - 2^-21 (bound) up to float32 rounding.

    Returns:
      The compressor. Bits: 16 d + 64 rows.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.scaled_half()
      >>> compressor.update(jnp.array([2.0, 6.0]) * 2.0**-40, compressor.init(None))[0].tolist()
      [1.8189894035458565e-12, 5.4569682106375694e-12]

    References:
      The mean-and-deviation float16 of the hivemind library (Ryabinin et al., 2021).
    """
    return Compressor(ScaledHalf())


def fp8(format: str = "e4m3", *, rows: bool = True) -> Compressor:
    """8-bit floats with one float32 scale for each row.

    ``C(x) = (M/F) fp8(F x/M)``, to nearest, ties to even, with M the largest magnitude of the row
    (the last axis) and F the largest number of the format: 448 for ``e4m3``, 57344 for ``e5m2``.
    alpha = 1 - 2^-8 - r 2^-20/448^2 for e4m3, 1 - 2^-6 - r 2^-34/57344^2 for e5m2, rows of
    length r (bound).

    Args:
      format: ``"e4m3"`` (3 bits of mantissa) or ``"e5m2"`` (2, more range).
      rows: a scale for each row; False: one for the leaf.

    Returns:
      The compressor. Bits: 8 d + 32 rows.

    Raises:
      ValueError: for another format.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.fp8()
      >>> x = jnp.array([[448.0, 0.1], [3.5, 0.0]])
      >>> compressor.update(x, compressor.init(None))[0].tolist()
      [[448.0, 0.1015625], [3.5, 0.0]]

    References:
      Micikevicius et al., FP8 formats for deep learning, 2022; row scales as in FBGEMM.
    """
    _check.word("fp8", "format", format, FORMATS)
    _check.flag("fp8", "rows", rows)
    return Compressor(Fp8(format, rows))


def log_quantize(bits: int) -> Compressor:
    """Signs and powers of two: log2 of the magnitude rounded to nearest.

    ``C(x) = sign(x) 2^e`` with e = round(log2 |x|), from the largest e of the leaf downwards 2^bits
    - 1 powers; smaller values become 0. alpha = (1 - c)/(1 + (d-1) t^2), c = (sqrt 2 - 1)^2,
    t = 2^(2 - 2^bits) (bound).

    Args:
      bits: bits of an exponent, 1 to 7; a sign bit comes on top.

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
      representation, 2016, section 3; the full-scale range is the leaf's own.
    """
    _check.count("log_quantize", "bits", bits, least=1, most=7)
    return Compressor(LogQuantize(bits))
