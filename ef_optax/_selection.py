"""The k entries of largest magnitude, exactly.

Magnitudes are compared as integers: the bit pattern of a float without its sign bit grows with the
magnitude, orders denormals that the processor may flush to zero, and puts inf and then NaN above
everything. Ties go to the lowest index, so the selected set is that of a stable sort by falling
magnitude.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def magnitude_order(x: jax.Array) -> jax.Array:
    """Maps a float array to unsigned integers that are ordered as ``|x|`` is.

    Args:
      x: floating array of any shape.

    Returns:
      Unsigned integers of the same width and shape.

    Example:
      >>> import jax.numpy as jnp
      >>> order = magnitude_order(jnp.array([-2.0, 1.0, 0.0, -0.0]))
      >>> bool(order[0] > order[1]), order[2:].tolist()
      (True, [0, 0])
    """
    width = x.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    bits = lax.bitcast_convert_type(x, unsigned)
    return bits & jnp.asarray((1 << (width - 1)) - 1, unsigned)


def top_k_indices(x: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` largest magnitudes, ascending; ties go to the lowest index.

    Args:
      x: floating array of shape (d,).
      k: static number of entries, ``0 <= k <= d``.

    Returns:
      int32 of shape (k,).

    Raises:
      ValueError: if ``k`` is not in ``0 ... d`` or ``x`` is not one-dimensional.

    Example:
      >>> import jax.numpy as jnp
      >>> top_k_indices(jnp.array([1.0, -3.0, 2.0, 3.0]), 2).tolist()
      [1, 3]
    """
    if x.ndim != 1:
        raise ValueError(f"x must be one-dimensional, got shape {x.shape}: flatten it first")
    if not 0 <= k <= x.size:
        raise ValueError(f"k must be between 0 and the size {x.size}, got {k}")
    if k == 0 or k == x.size:
        return jnp.arange(k, dtype=jnp.int32)
    return jnp.sort(lax.top_k(magnitude_order(x), k)[1])
