"""Sums, norms and extremes of the blocks of a leaf, in one pass over it and without a copy."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from ef_optax._numeric.blocks import block_length
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._numeric.reductions import by_block


def block_norms(x: Array, block: int | None, norm: str) -> Array:
    """The norm of every block of a leaf.

    Args:
      x: the leaf, any shape, float32 or float64.
      block: length of the blocks, None for a single one.
      norm: ``"l2"`` or ``"linf"``. The 2-norm overflows or underflows only if its result does.

    Returns:
      Shape (blocks,); NaN for blocks that contain a NaN.

    >>> block_norms(jnp.array([3.0, -4.0, 3e30, 4e30, 6e-30]), 2, "l2").tolist()[0]
    5.0
    """
    return _largest(x, block) if norm == "linf" else _two_norms(x, block)


def leaf_norm(x: Array, norm: str) -> Array:
    """The norm of a whole leaf as a scalar, 0 for an empty one.

    Args:
      x: the leaf, any shape, float32 or float64.
      norm: ``"l2"`` or ``"linf"``. The 2-norm overflows or underflows only if its result does.

    Returns:
      The norm, NaN if there is a NaN.

    >>> leaf_norm(jnp.array([[3.0, -4.0]]), "l2").item(), leaf_norm(jnp.zeros(0), "linf").item()
    (5.0, 0.0)
    """
    return jnp.sum(block_norms(x, None, norm))  # a sum of one number, or of none


def leaf_sums(*operands: Array) -> tuple[Array, ...]:
    """The sums of several arrays of one shape, which are read together, as scalars.

    >>> [x.item() for x in leaf_sums(jnp.arange(3.0), jnp.ones(3))]
    [3.0, 3.0]
    """
    return tuple(jnp.sum(part) for part in block_sums(operands, None))


def block_sums(operands: tuple[Array, ...], block: int | None) -> tuple[Array, ...]:
    """The sums over every block of several arrays of one shape, which are read together.

    >>> [x.tolist() for x in block_sums((jnp.arange(3.0), jnp.ones(3)), 2)]
    [[1.0, 2.0], [2.0, 1.0]]
    """
    flat = tuple(x.reshape(-1) for x in operands)
    return by_block(flat, block_length(flat[0].size, block), (lax.add,) * len(flat))


def block_extremes(x: Array, block: int | None) -> tuple[Array, Array]:
    """The smallest and the largest number of every block; arbitrary for a block with a NaN.

    >>> [x.tolist() for x in block_extremes(jnp.array([3.0, -1.0, 2.0]), 2)]
    [[-1.0, 2.0], [3.0, 2.0]]
    """
    flat = x.reshape(-1)
    low, high = by_block((flat, flat), block_length(x.size, block), (lax.min, lax.max))
    return low, high


def power_of_two(x: Array) -> Array:
    """The largest power of two up to a positive number, 1 for zero; scaling by it rounds nothing.

    >>> power_of_two(jnp.array([6.0, 0.3, 0.0])).tolist()
    [4.0, 0.25, 1.0]
    """
    integer = jnp.dtype(f"int{bits_of(x.dtype)}")
    fraction = jnp.finfo(x.dtype).nmant
    exponent = lax.bitcast_convert_type(x, integer) >> fraction
    return safe_divisor(lax.bitcast_convert_type(exponent << fraction, x.dtype))


def _largest(x: Array, block: int | None) -> Array:
    """The largest magnitudes, compared as integers, because a float maximum may lose a NaN."""
    order = magnitude_order(x.reshape(-1))
    (largest,) = by_block((order,), block_length(x.size, block), (lax.max,))
    return lax.bitcast_convert_type(largest, x.dtype)


def _two_norms(x: Array, block: int | None) -> Array:
    """The norms from sums of squares at three scales; each block uses the sum that is in range.

    Let e be the largest exponent (128 for float32). Unscaled squares serve sums from 2^(2 - e/2) to
    2^(e - 8). For smaller sums the values are multiplied by 2^(3e/4 - 2) before they are squared,
    which keeps denormals and stays below 2^e. For larger sums they are multiplied by 2^(-e/2 - 6),
    which stays below 2^e for every finite norm.
    """
    largest = jnp.finfo(x.dtype).maxexp
    up, down = 2.0 ** (3 * largest // 4 - 2), 2.0 ** (-largest // 2 - 6)
    flat = x.reshape(-1)
    squares = tuple(jnp.square(flat * flat.dtype.type(scale)) for scale in (1.0, up, down))
    plain, raised, lowered = block_sums(squares, block)
    small, large = plain < 2.0 ** (2 - largest // 2), plain > 2.0 ** (largest - 8)
    square = jnp.where(small, raised, jnp.where(large, lowered, plain))
    scale = jnp.where(small, 1 / up, jnp.where(large, 1 / down, 1.0)).astype(x.dtype)
    return jnp.sqrt(square) * scale
