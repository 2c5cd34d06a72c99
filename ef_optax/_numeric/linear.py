"""Matrix products that are as accurate as their dtype.

On GPU and TPU the default is to round float32 matrices to 10 bits or fewer before multiplying them.
A transform would then not be orthonormal, and the mean that the receivers decode would not be the
mean of what the workers subtract from their residuals. The products of codecs are thin, and bound
by memory and not by arithmetic, so full precision costs little.
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


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """The sum of products, as `jax.numpy.einsum` defines it.

    Example:
      >>> einsum("i,i->", jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])).item()
      11.0
    """
    return jnp.einsum(subscripts, *operands, precision=_FULL)
