"""Symmetric quantisation of blocks, scaled by their largest magnitude."""

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
from ef_optax._numeric.norms import block_norms
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._dithering import linf_omega
from ef_optax.compressors.quantize._rounding import Rounding


@dataclasses.dataclass(frozen=True)
class BlockQuantize(Rounding):
    """Multiples of M/L, with L = 2^(width - 1) - 1 and M the largest magnitude of the block."""

    width: int
    block: int | None = None
    key: Array | None = None

    @property
    def ignores_zeros(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        exact = self.key is None or self._steps == 1
        return dataclasses.replace(super().traits, basis="exact" if exact else "bound")

    @property
    def _steps(self) -> int:
        return 2 ** (self.width - 1) - 1

    def encode(self, x: Array, key: Array | None = None) -> Message:
        wide = x.astype(scale_dtype(x.dtype))
        largest = block_norms(wide, self.block, "linf")
        y = blockwise(jnp.divide, wide, safe_divisor(largest), block=self.block)
        codes = self.round(jnp.clip(y, -1, 1) * self._steps, key).astype(jnp.int32) + self._steps
        return {"codes": fields.pack(codes, self.width), "largest": largest}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self.width, size_of(like.shape))
        step = divide(message["largest"], self._steps)
        signed = (codes.astype(jnp.int32) - self._steps).astype(step.dtype)
        values = blockwise(jnp.multiply, signed, step, block=self.block)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = block_count(size, self.block) * bits_of(scale_dtype(dtype))
        return scales + size * self.width

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """1/(1 + q) with q = (B - 1)/(4 L^2), attained if all others are at half a step."""
        del num_workers
        if self.key is not None:
            return None
        return 1 / (1 + (block_length(size_of(shape), self.block) - 1) / (4 * self._steps**2))

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        if self.key is None:
            return None
        return linf_omega(block_length(size_of(shape), self.block), self._steps)


def block_quantize(bits: int, *, block: int | None = 256, key: Any = None) -> Compressor:
    """Signed integers relative to the largest magnitude of each block; zero stays zero.

    ``C(x)_i = (M/L) q_i``, where M is the block's largest magnitude, L = 2^(bits-1) - 1, and q_i is
    L x_i/M rounded: at random with a key (unbiased), else to nearest. Without a key,
    alpha = 1/(1 + (B-1)/(4 L^2)) (exact). With a key, omega = (sqrt(B) - 1)/2 for L = 1, else
    min((B-1)/(4 L^2), sqrt(B-1)/(2 L)) (bound).

    Args:
      bits: bits of a value, 2 to 16.
      block: length B of the blocks; None for one block per leaf.
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
    check.count("block_quantize", "bits", bits, least=2, most=16)
    check.count("block_quantize", "block", block, optional=True)
    chosen = None if key is None else as_key(key, "block_quantize")
    return Compressor(BlockQuantize(bits, block, chosen))
