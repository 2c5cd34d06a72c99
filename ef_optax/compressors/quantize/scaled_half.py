"""float16 of entries that are normalised by their mean and standard deviation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import block_norms, block_sums, power_of_two
from ef_optax._numeric.rounding import rounded
from ef_optax._numeric.rows import _rows, row_count, row_length
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class ScaledHalf(Codec):
    """Rows shifted to mean 0, scaled to standard deviation 1, and rounded to float16."""

    @property
    def traits(self) -> Traits:
        return Traits(basis="bound")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows, length = _rows(x), row_length(x.shape)
        power = power_of_two(block_norms(rows, length, "linf"))[:, None]

        def mean_of(rows: Array) -> Array:
            return block_sums((rows,), length)[0][:, None] / length

        mean = mean_of(rows / power) * power
        centred = rows - mean
        deviation = power * jnp.sqrt(mean_of(jnp.square(centred / power)))
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
        """1 - 2^-21, since float16 has 11 bits and a row is never shorter than its deviations."""
        del shape, num_workers
        return 1 - 2.0**-21


def scaled_half() -> Compressor:
    """float16 after shifting and scaling each row to mean 0 and standard deviation 1.

    Along the last axis, ``y = (x - mean)/deviation`` is rounded to float16, with deviation 1 in
    place of 0, and ``C(x) = deviation y + mean``. alpha = 1 - 2^-21 (bound) up to float32 rounding.

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
