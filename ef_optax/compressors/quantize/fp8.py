"""8-bit floats with a scale for each row."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import block_norms, power_of_two
from ef_optax._numeric.rounding import rounded
from ef_optax._numeric.rows import _rows, row_count, row_length
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor

FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """Values of 8 bits, scaled so that the largest magnitude of a row is the format's largest."""

    format: str
    rows: bool = True

    @property
    def traits(self) -> Traits:
        return Traits(basis="bound")

    def _largest(self) -> float:
        return float(jnp.finfo(FORMATS[self.format]).max)

    def _cut(self, x: Array) -> Array:
        return _rows(x) if self.rows else _rows(x.reshape(-1))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows, top = self._cut(x), self._largest()
        largest = block_norms(rows, rows.shape[1], "linf")[:, None]
        power = power_of_two(largest)
        scaled = jnp.clip(rows / power * (top / safe_divisor(largest / power)), -top, top)
        values = rounded(scaled, FORMATS[self.format])
        return {"values": values.reshape(-1), "largest": largest[:, 0]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        largest = message["largest"][:, None]
        shape = like.shape if self.rows else size_of(like.shape)
        rows = message["values"].reshape(row_count(shape), row_length(shape))
        power = power_of_two(largest)
        factor = self._largest() / safe_divisor(largest / power)
        values = jnp.where(largest == 0, largest, rows.astype(largest.dtype) / factor * power)
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


def fp8(format: str = "e4m3", *, rows: bool = True) -> Compressor:
    """8-bit floats with one float32 scale for each row.

    ``C(x) = (M/F) fp8(F x/M)``, rounded to nearest with ties to even. M is the largest magnitude of
    the row (along the last axis), and F the largest number of the format: 448 for ``e4m3``, 57344
    for ``e5m2``. For rows of length r, alpha = 1 - 2^-8 - r 2^-20/448^2 for e4m3 and
    1 - 2^-6 - r 2^-34/57344^2 for e5m2 (bound).

    Args:
      format: ``"e4m3"`` (3 bits of mantissa) or ``"e5m2"`` (2 bits of mantissa, and more range).
      rows: True for a scale per row, False for one scale per leaf.

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
    check.word("fp8", "format", format, FORMATS)
    check.flag("fp8", "rows", rows)
    return Compressor(Fp8(format, rows))
