"""Matrix products that are as accurate as their dtype.

On GPU and TPU a product of float32 matrices is by default rounded to 10 bits or fewer before it is
multiplied. A transform would then not be orthonormal, nor the mean of what was sent the mean of
what the workers subtract from their residuals. The products of codecs are thin, bound by memory
and not by arithmetic, so full precision costs little.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FULL = jax.lax.Precision.HIGHEST


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """``left @ right``.

    Example:
      >>> matmul(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])).tolist()
      [[11.0]]
    """
    return jnp.matmul(left, right, precision=_FULL)


def einsum(spelling: str, *operands: jax.Array) -> jax.Array:
    """The sum of products that `jax.numpy.einsum` would give for this spelling.

    Example:
      >>> einsum("i,i->", jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])).item()
      11.0
    """
    return jnp.einsum(spelling, *operands, precision=_FULL)
