"""Divisions that are safe for scales of zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array


def safe_divisor(scale: Array) -> Array:
    """The scale, with zeros replaced by ones: what is divided by a zero scale is zero as well."""
    return jnp.where(scale == 0, jnp.ones((), scale.dtype), scale)


def divide(scale: Array, levels: int) -> Array:
    """``scale / levels``, correctly rounded.

    Without the barrier the compiler multiplies by the reciprocal of the constant, which may give
    another number: if the norm is 7, 7 levels must be integers.
    """
    divisor = jax.lax.optimization_barrier(jnp.full_like(scale, levels))
    return scale / divisor
