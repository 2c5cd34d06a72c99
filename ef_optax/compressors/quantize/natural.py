"""Natural compression: only sign and exponent travel, and the mantissa is a probability."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key, random_words
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Natural(Codec):
    """Random rounding to one of the two neighbouring powers of two."""

    key: Array

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, deterministic=False, basis="exact")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        fraction, width = _layout(x.dtype)
        unsigned = jnp.dtype(f"uint{bits_of(x.dtype)}")
        bits = jax.lax.bitcast_convert_type(flat, unsigned)
        magnitude = bits & jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
        # A carry out of the mantissa happens with probability mantissa / 2^fraction, exactly.
        raised = (magnitude + _random_field(key, flat.shape, fraction, unsigned)) >> fraction
        top = 2**width - 1  # the exponent of inf and NaN
        own = magnitude >> fraction
        exponent = jnp.where(own == top, own, jnp.minimum(raised, top - 1)).astype(jnp.uint32)
        negative = (bits >> (bits_of(x.dtype) - 1)).astype(jnp.uint32)
        return fields.pack((negative << width) | exponent, width + 1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        fraction, width = _layout(like.dtype)
        unsigned = jnp.dtype(f"uint{bits_of(like.dtype)}")
        codes = fields.unpack(message, width + 1, size_of(like.shape)).astype(unsigned)
        exponent = codes & jnp.asarray(2**width - 1, unsigned)
        negative = codes >> width
        bits = (negative << (bits_of(like.dtype) - 1)) | (exponent << fraction)
        return jax.lax.bitcast_convert_type(bits, like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * (1 + _layout(dtype)[1])

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        """1/8 for normal numbers below the largest power of two, attained at (4/3) 2^a."""
        del shape, num_workers
        return 1 / 8


def _layout(dtype: Any) -> tuple[int, int]:
    """Width of the mantissa field and of the exponent field."""
    info = jnp.finfo(dtype)
    return info.nmant, info.nexp


def _random_field(key: Array, shape: tuple[int, ...], width: int, dtype: Any) -> Array:
    """Uniform integers of ``width`` bits."""
    if width <= 32:
        return (random_words(key, shape) >> (32 - width)).astype(dtype)
    return jax.random.bits(key, shape, dtype) >> (bits_of(dtype) - width)


def natural(key: Any = None) -> Compressor:
    """Rounds at random to one of the two neighbouring powers of two: 9 bits of a float32.

    For ``2^a <= |t| <= 2^(a+1)``: ``C(t) = sign(t) 2^a`` with probability ``(2^(a+1) - |t|)/2^a``,
    else ``sign(t) 2^(a+1)``. In bits: the mantissa is cleared, and one is added to the exponent
    with probability mantissa/2^23. It is unbiased with omega = 1/8 (exact) for normal numbers.
    Powers of two and zero are kept. Denormal numbers become 0 or the smallest normal number,
    without bias. The largest exponent is not raised, so that no infinity arises.

    Args:
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: 9 d for float32 and bfloat16, 6 d for float16.

    Raises:
      TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.natural(key=0)
      >>> compressor.update(jnp.array([4.0, -0.5, 0.0]), compressor.init(None))[0].tolist()
      [4.0, -0.5, 0.0]
      >>> compressor.bits((100,)), compressor.codec.omega(100)
      (900, 0.125)

    References:
      Horvath et al., Natural compression for distributed deep learning, 2022,
      Definition 1 and Theorem 3.
    """
    return Compressor(Natural(as_key(key, "natural")))
