"""DoReFa's gradient quantiser: evenly spaced values from -M to M, without zero."""

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
from ef_optax._numeric.blocks import block_count, block_length, blockwise
from ef_optax._numeric.division import divide, safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import block_norms
from ef_optax._numeric.random import as_key, round_randomly
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Dorefa(Codec):
    """2^bits values from -M to M, with stochastic rounding; zero is not one of them."""

    key: Array
    bits_per_value: int
    bucket: int | None = None

    @property
    def separable_into(self) -> int | None:
        return self.bucket

    @property
    def ignores_zeros(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, deterministic=False, streams=True, basis="exact")

    @property
    def _steps(self) -> int:
        return 2**self.bits_per_value - 1

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        wide = x.astype(scale_dtype(x.dtype))
        largest = block_norms(wide, self.bucket, "linf")
        divisor = safe_divisor(largest)
        y = blockwise(lambda x, m: x / m / 2 + 0.5, wide, divisor, block=self.bucket)
        codes = round_randomly(jnp.clip(y, 0, 1) * self._steps, key).astype(jnp.uint32)
        return {"codes": fields.pack(codes, self.bits_per_value), "largest": largest}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self.bits_per_value, size_of(like.shape))
        largest = message["largest"]
        odd = (2 * codes.astype(jnp.int32) - self._steps).astype(largest.dtype)
        step = divide(largest, self._steps)
        values = blockwise(jnp.multiply, odd, step, block=self.bucket)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = block_count(size, self.bucket) * bits_of(scale_dtype(dtype))
        return scales + size * self.bits_per_value

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        """(B - 1)/L^2, attained by a single spike, since each zero has variance (M/L)^2."""
        del num_workers
        return (block_length(size_of(shape), self.bucket) - 1) / self._steps**2


def dorefa(bits: int, key: Any = None, *, bucket: int | None = None) -> Compressor:
    """DoReFa's gradient quantiser: 2^bits evenly spaced values from -M to M.

    ``C(x) = 2M (q/L - 1/2)``, where L = 2^bits - 1, M is the largest magnitude, and q is the random
    rounding of ``L (x/(2M) + 1/2)``. It is unbiased with omega = (B - 1)/L^2 (exact, for a single
    spike). Zero is not a value: in a leaf that is not all zero, zeros become +-M/L.

    Args:
      bits: bits of a value, 1 to 16.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      bucket: length B of the pieces with their own scale; None for one scale per leaf.

    Returns:
      The compressor. Bits: 32 ceil(d/B) + bits d.

    Raises:
      ValueError: for a bad ``bits`` or ``bucket``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.dorefa(2, key=0)
      >>> compressor.update(jnp.array([3.0, -3.0, 1.0]), compressor.init(None))[0].tolist()
      [3.0, -3.0, 1.0]

    References:
      Zhou et al., DoReFa-Net, 2016, equation 12.
    """
    check.count("dorefa", "bits", bits, least=1, most=16)
    check.count("dorefa", "bucket", bucket, optional=True)
    return Compressor(Dorefa(as_key(key, "dorefa"), bits, bucket))
