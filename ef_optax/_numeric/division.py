"""Divisions that are safe for scales of zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array


def safe_divisor(scale: Array) -> Array:
    """The scale, or one where it is zero: what is divided by it is zero there as well."""
    return jnp.where(scale == 0, jnp.ones((), scale.dtype), scale)


def divide(scale: Array, levels: int) -> Array:
    """``scale / levels``, correctly rounded.

    The compiler multiplies by the reciprocal of a constant instead, which is not always the same
    number: 7 states of norm 7 should be whole numbers.
    """
    divisor = jax.lax.optimization_barrier(jnp.full_like(scale, levels))
    return scale / divisor
