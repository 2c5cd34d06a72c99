"""Dtypes of leaves: how wide they are, and which can be exchanged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


TRAINABLE_PART = (
    "keep it out of params: pass only the floating-point arrays, and put the model together inside "
    "the loss. equinox.partition(model, equinox.is_inexact_array) and nnx.split(model, nnx.Param, "
    "...) separate them."
)
"""The remedy for leaves that are not trained."""

FLOATING_ONLY = f"but only floating-point leaves can be exchanged; {TRAINABLE_PART}"
"""The end of the message that refuses other leaves, which have no gradient to compress."""


def bits_of(dtype: Any) -> int:
    """Bits of one element of ``dtype``.

    >>> bits_of(jnp.bfloat16)
    16
    """
    return jnp.dtype(dtype).itemsize * 8


def wide_dtype(dtype: Any) -> Any:
    """The dtype if it is float32 or wider, else float32, whatever the promotion rules are.

    >>> wide_dtype(jnp.bfloat16), wide_dtype("float64")
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"a leaf has dtype {dtype}, {FLOATING_ONLY}")
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def scale_dtype(dtype: Any) -> Any:
    """The dtype in which a scale travels: float32, or the dtype of the leaf if that is wider."""
    return wide_dtype(dtype)
