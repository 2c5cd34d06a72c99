"""Uniform quantisation between the least and the largest entry of a bucket."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.blocks import block_count, block_length, blockwise
from ef_optax._numeric.division import divide, safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import block_extremes
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._rounding import Rounding


@dataclasses.dataclass(frozen=True)
class UniformBuckets(Rounding):
    """2^width evenly spaced values from the smallest to the largest of each bucket, inclusive."""

    width: int
    block: int | None = None
    key: Array | None = None

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, basis="exact")

    @property
    def _steps(self) -> int:
        return 2**self.width - 1

    def encode(self, x: Array, key: Array | None = None) -> Message:
        wide = x.astype(scale_dtype(x.dtype))
        low, high = block_extremes(wide, self.block)
        spread = high - low
        y = blockwise(
            lambda x, low, s: (x - low) / s, wide, low, safe_divisor(spread), block=self.block
        )
        codes = self.round(jnp.clip(y, 0, 1) * self._steps, key).astype(jnp.uint32)
        return {
            "codes": fields.pack(codes, self.width),
            "low": low,
            "step": divide(spread, self._steps),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self.width, size_of(like.shape))
        low, step = message["low"], message["step"]
        codes = codes.astype(step.dtype)
        values = blockwise(lambda c, low, s: low + c * s, codes, low, step, block=self.block)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = 2 * block_count(size, self.block) * bits_of(scale_dtype(dtype))
        return scales + size * self.width

    def _error(self, shape: Shape) -> float:
        """(B - 2)/(2 L^2), attained by (1, -1, 0, ..., 0), whose extremes are exact."""
        length = block_length(size_of(shape), self.block)
        return max(0, length - 2) / (2 * self._steps**2)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        error = self._error(shape)
        return 1 - error if self.key is None and error < 1 else None

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        return None if self.key is None else self._error(shape)


def uniform(bits: int, *, bucket: int | None = None, key: Any = None) -> Compressor:
    """2^bits evenly spaced values between the extremes of each bucket.

    ``C(x)_i = low + step q_i``, where low is the least value of the bucket, step = (high - low)/L,
    L = 2^bits - 1, and q_i is (x_i - low)/step rounded: at random with a key (unbiased), else to
    nearest. Extremes and constant buckets are exact; zeros in general are not. The error constant,
    which is omega with a key and 1 - alpha without, is (B - 2)/(2 L^2) (exact).

    Args:
      bits: bits of a value, 1 to 16.
      bucket: length B of the pieces with their own extremes; None for one bucket per leaf.
      key: a JAX random key or an int for stochastic rounding; None rounds to nearest.

    Returns:
      The compressor. Bits: 64 ceil(d/B) + bits d.

    Raises:
      ValueError: for a bad ``bits`` or ``bucket``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.uniform(2)
      >>> compressor.update(jnp.array([-1.0, 0.2, 2.0]), compressor.init(None))[0].tolist()
      [-1.0, 0.0, 2.0]

    References:
      Suresh, Yu, Kumar, McMahan, Distributed mean estimation, 2017, section 2.2;
      bucketed as in Markov et al., CGX, 2022.
    """
    check.count("uniform", "bits", bits, least=1, most=16)
    check.count("uniform", "bucket", bucket, optional=True)
    return Compressor(UniformBuckets(bits, bucket, None if key is None else as_key(key, "uniform")))
