"""Evenly spaced codes: between the extremes of a block, or up to its largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check, _fields
from ef_optax._base import Array, Codec, Message, Shape, as_key, bits_of, size_of
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import (
    block_count,
    block_length,
    blockwise,
    divide,
    round_randomly,
    safe_divisor,
)
from ef_optax.compressors._norms import block_extremes, block_norms
from ef_optax.compressors.dithering import linf_omega
from ef_optax.compressors.sign import scale_dtype


class Rounding(Codec):
    """Codes of ``width`` bits, rounded at random if there is a key, to nearest if not."""

    key: Array | None
    width: int
    block: int | None

    @property
    def deterministic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.key is None

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.key is not None

    @staticmethod
    def round(y: Array, key: Array | None) -> Array:
        """Whole numbers next to y; to nearest, ties to even, without a key."""
        return jnp.round(y) if key is None else round_randomly(y, key)


@dataclasses.dataclass(frozen=True)
class UniformBuckets(Rounding):
    """2^width values from the smallest to the largest of each bucket, both included."""

    width: int
    block: int | None = None
    key: Array | None = None
    basis: ClassVar[str] = "exact"

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
            "codes": _fields.pack(codes, self.width),
            "low": low,
            "unit": divide(spread, self._steps),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = _fields.unpack(message["codes"], self.width, size_of(like.shape))
        low, unit = message["low"], message["unit"]
        codes = codes.astype(unit.dtype)
        values = blockwise(lambda c, low, u: low + c * u, codes, low, unit, block=self.block)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = 2 * block_count(size, self.block) * bits_of(scale_dtype(dtype))
        return scales + size * self.width

    def _error(self, shape: Shape) -> float:
        """(B - 2)/(2 L^2), attained by (1, -1, 0, ..., 0): the extremes are exact."""
        length = block_length(size_of(shape), self.block)
        return max(0, length - 2) / (2 * self._steps**2)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        error = self._error(shape)
        return 1 - error if self.key is None and error < 1 else None

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        return None if self.key is None else self._error(shape)


@dataclasses.dataclass(frozen=True)
class BlockQuantize(Rounding):
    """Whole multiples of M/L, L = 2^(width - 1) - 1, M the largest magnitude of the block."""

    width: int
    block: int | None = None
    key: Array | None = None

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "exact" if self.key is None or self._steps == 1 else "bound"

    @property
    def _steps(self) -> int:
        return 2 ** (self.width - 1) - 1

    def encode(self, x: Array, key: Array | None = None) -> Message:
        wide = x.astype(scale_dtype(x.dtype))
        largest = block_norms(wide, self.block, "linf")
        y = blockwise(jnp.divide, wide, safe_divisor(largest), block=self.block)
        codes = self.round(jnp.clip(y, -1, 1) * self._steps, key).astype(jnp.int32) + self._steps
        return {"codes": _fields.pack(codes, self.width), "largest": largest}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = _fields.unpack(message["codes"], self.width, size_of(like.shape))
        step = divide(message["largest"], self._steps)
        signed = (codes.astype(jnp.int32) - self._steps).astype(step.dtype)
        values = blockwise(jnp.multiply, signed, step, block=self.block)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = block_count(size, self.block) * bits_of(scale_dtype(dtype))
        return scales + size * self.width

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """1/(1 + q), q = (B - 1)/(4 L^2), attained with all others at half a step."""
        del num_workers
        if self.key is not None:
            return None
        return 1 / (1 + (block_length(size_of(shape), self.block) - 1) / (4 * self._steps**2))

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        if self.key is None:
            return None
        return linf_omega(block_length(size_of(shape), self.block), self._steps)


def uniform(bits: int, *, bucket: int | None = None, key: Any = None) -> Compressor:
    """2^bits evenly spaced values between the extremes of each bucket.

    ``C(x)_i = low + unit q_i`` with low the least value of the bucket, unit = (high - low)/L,
    L = 2^bits - 1, and q_i = (x_i - low)/unit rounded: at random with a key (unbiased), else to
    nearest. The extremes and constant buckets are exact; zeros in general are not. The error
    constant, omega with a key and 1 - alpha without, is (B - 2)/(2 L^2) (exact).

    Args:
      bits: bits of a value, 1 to 16.
      bucket: length B of the pieces with extremes of their own; None: the whole leaf.
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
    _check.count("uniform", "bits", bits, least=1, most=16)
    _check.count("uniform", "bucket", bucket, optional=True)
    return Compressor(UniformBuckets(bits, bucket, None if key is None else as_key(key, "uniform")))


def block_quantize(bits: int, *, block: int | None = 256, key: Any = None) -> Compressor:
    """Signed integers relative to the largest magnitude of each block; zero stays zero.

    ``C(x)_i = (M/L) q_i`` with M the block's largest magnitude, L = 2^(bits-1) - 1 and q_i =
    L x_i/M rounded: at random with a key (unbiased), else to nearest. alpha = 1/(1 + (B-1)/(4 L^2))
    without a key (exact); with one, omega = (sqrt(B) - 1)/2 for L = 1, else
    min((B-1)/(4 L^2), sqrt(B-1)/(2 L)) (bound).

    Args:
      bits: bits of a value, 2 to 16.
      block: length B of the blocks; None: the whole leaf.
      key: a JAX random key or an int for stochastic rounding; None rounds to nearest.

    Returns:
      The compressor. Bits: 32 ceil(d/B) + bits d.

    Raises:
      ValueError: for a bad ``bits`` or ``block``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.block_quantize(3)
      >>> compressor.update(jnp.array([6.0, -2.5, 0.0]), compressor.init(None))[0].tolist()
      [6.0, -2.0, 0.0]
      >>> compressor.bits((1000,))
      3128

    References:
      The block-wise absolute maximum of Dettmers et al., 8-bit optimizers via block-wise
      quantization, 2022, with evenly spaced codes.
    """
    _check.count("block_quantize", "bits", bits, least=2, most=16)
    _check.count("block_quantize", "block", block, optional=True)
    chosen = None if key is None else as_key(key, "block_quantize")
    return Compressor(BlockQuantize(bits, block, chosen))
