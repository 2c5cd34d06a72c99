"""Rounding to a narrower float in a way that the compiler cannot undo."""

from __future__ import annotations

from typing import Any

import jax


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x``, rounded to a narrower floating dtype.

    If a conversion back follows in the same program, XLA may leave both out (its *excess
    precision*, on by default; seen on a GPU). The sender would then subtract from its residual a
    value that no receiver decodes, and the rounding error of every message would be lost.

    Args:
      x: floating array of any shape.
      dtype: the narrower dtype.

    Returns:
      The values in that dtype, of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> rounded(jnp.array([1.001]), jnp.bfloat16).tolist()
      [1.0]
    """
    return jax.lax.optimization_barrier(x.astype(dtype))
