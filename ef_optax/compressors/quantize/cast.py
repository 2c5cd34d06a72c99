"""Casts: every value is sent, with fewer bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key, random_words
from ef_optax._numeric.rounding import rounded
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """``C(x)`` is x rounded to a narrower floating dtype; it saturates instead of overflowing."""

    dtype: str
    key: Array | None = None

    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        # It is homogeneous only with float32's exponent: with others the scale decides what
        # overflows or becomes denormal.
        return Traits(
            homogeneous=self.dtype in ("bfloat16", "float32"),
            unbiased=self.key is not None,
            deterministic=self.key is None,
        )

    def encode(self, x: Array, key: Array | None = None) -> Message:
        if key is not None:
            x = _round_randomly(x.astype(jnp.float32), key)
        largest = jnp.asarray(jnp.finfo(self.dtype).max, jnp.float32)
        if bits_of(self.dtype) < bits_of(x.dtype):
            x = jnp.clip(x, -largest.astype(x.dtype), largest.astype(x.dtype))
        return rounded(x, self.dtype).reshape(-1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return size_of(shape) * bits_of(self.dtype)


def _round_randomly(x: Array, key: Array) -> Array:
    """x, rounded at random to a neighbour in bfloat16, so that the expectation is x."""
    # bfloat16 is the upper half of float32: a random lower half carries with the right probability.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = words + (random_words(key, x.shape) >> 16)
    carried = jax.lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), carried, x)


def cast(dtype: Any, *, key: Any = None) -> Compressor:
    """Rounds every value to a narrower float: ``C(x) = dtype(x)``, to nearest, ties to even.

    With a key, values are rounded to bfloat16 at random, so that the expectation of C(x) is x.
    Then a sum of many small values that is stored as bfloat16 does not stand still.

    Values beyond the range saturate. For normal numbers the relative error is at most 2^-(m+1),
    with m mantissa bits (bf16: 2^-8, fp16: 2^-11). Below the smallest normal number only the
    absolute error is bounded, so no contraction constant holds for every input.

    Args:
      dtype: ``"bfloat16"``, ``"float16"``, ``"float8_e4m3fn"``, ``"float8_e5m2"`` or any other
        JAX floating dtype of 8, 16 or 32 bits.
      key: a JAX random key or an int for stochastic rounding (bfloat16 only); None rounds to
        nearest.

    Returns:
      The compressor. Bits: d times the width of ``dtype``.

    Raises:
      ValueError: if ``dtype`` is not such a dtype, or not bfloat16 with a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.cast("bfloat16").bits((100,))
      1600
    """
    try:
        name = jnp.dtype(dtype).name
        valid = jnp.issubdtype(name, jnp.floating) and jnp.dtype(name).itemsize in (1, 2, 4)
    except TypeError:
        valid = False
        name = ""
    if not valid:
        raise ValueError(
            f"cast: dtype={dtype!r} is not a float of 8, 16 or 32 bits; try 'bfloat16'."
        )
    if key is not None and name != "bfloat16":
        raise ValueError(f"cast: key={key!r} rounds to 'bfloat16' only, not to {name!r}.")
    return Compressor(Cast(name, None if key is None else as_key(key, "cast")))
