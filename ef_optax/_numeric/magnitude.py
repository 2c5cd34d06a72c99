"""Magnitudes as integers; these order denormals too, and put inf and then NaN above all others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def magnitude_order(x: jax.Array) -> jax.Array:
    """Maps a float array to integers that are ordered as ``|x|`` is.

    Args:
      x: floating array of any shape.

    Returns:
      Signed integers of the same width and shape, none negative.

    Example:
      >>> order = magnitude_order(jnp.array([-2.0, 1.0, 0.0, -0.0]))
      >>> bool(order[0] > order[1]), order[2:].tolist()
      (True, [0, 0])
    """
    integer = jnp.dtype(f"int{x.dtype.itemsize * 8}")
    return lax.bitcast_convert_type(x, integer) & jnp.asarray(jnp.iinfo(integer).max, integer)
