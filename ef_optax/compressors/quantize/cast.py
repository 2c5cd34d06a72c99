"""Casts: every value is sent, with fewer bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.rounding import rounded
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """``C(x)`` is x rounded to a narrower floating dtype; it saturates instead of overflowing."""

    dtype: str

    @property
    def traits(self) -> Traits:
        # It is homogeneous only with float32's exponent: with others the scale decides what
        # overflows or becomes denormal.
        return Traits(homogeneous=self.dtype in ("bfloat16", "float32"))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        largest = jnp.asarray(jnp.finfo(self.dtype).max, jnp.float32)
        if bits_of(self.dtype) < bits_of(x.dtype):
            x = jnp.clip(x, -largest.astype(x.dtype), largest.astype(x.dtype))
        return rounded(x, self.dtype).reshape(-1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        return size_of(shape) * bits_of(self.dtype)


def cast(dtype: Any) -> Compressor:
    """Rounds every value to a narrower float: ``C(x) = dtype(x)``, to nearest, ties to even.

    Values beyond the range saturate. For normal numbers the relative error is at most 2^-(m+1),
    with m mantissa bits (bf16: 2^-8, fp16: 2^-11). Below the smallest normal number only the
    absolute error is bounded, so no contraction constant holds for every input.

    Args:
      dtype: ``"bfloat16"``, ``"float16"``, ``"float8_e4m3fn"``, ``"float8_e5m2"`` or any other
        JAX floating dtype of 8, 16 or 32 bits.

    Returns:
      The compressor. Bits: d times the width of ``dtype``.

    Raises:
      ValueError: if ``dtype`` is not such a dtype.

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
    return Compressor(Cast(name))
