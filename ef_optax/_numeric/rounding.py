"""Rounding to a narrower float that the compiler may not undo."""

from __future__ import annotations

from typing import Any

import jax


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in a narrower floating dtype, really rounded.

    Where a conversion back follows in the same program, XLA may leave both out (its *excess
    precision*, on by default; seen on a GPU). The sender would then subtract from its residual what
    no receiver ever saw, and the rounding error of every message would be lost.

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
