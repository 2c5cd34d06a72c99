"""Leaves as matrices: what every codec means by row, column and rank.

A leaf with two or more axes is the matrix (all but the last axis) x (last axis): inputs by outputs
for dense layers, (height, width, inputs) by outputs for convolutions as Flax stores them. Leaves
with fewer axes have no matrix.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from ef_optax._base import Array, Shape


def matrix_shape(shape: Shape) -> tuple[int, int] | None:
    """Rows and columns of a leaf, or None if it is no matrix or empty.

    >>> matrix_shape((3, 3, 16, 32)), matrix_shape((7,)), matrix_shape((0, 4))
    ((144, 32), None, None)
    """
    if isinstance(shape, int) or len(shape) < 2 or 0 in shape:
        return None
    return math.prod(shape[:-1]), shape[-1]


def low_rank_shape(shape: Shape, rank: int) -> tuple[int, int, int] | None:
    """Rows, columns and rank of the factors, or None if they are not smaller than the leaf.

    >>> low_rank_shape((10, 20), 2), low_rank_shape((4, 4), 2)
    ((10, 20, 2), None)
    """
    matrix = matrix_shape(shape)
    if matrix is None:
        return None
    rows, columns = matrix
    rank = min(rank, rows, columns)
    return (rows, columns, rank) if rank * (rows + columns) < rows * columns else None


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``.

    >>> largest_divisor(96, 64), largest_divisor(7, 4)
    (48, 1)
    """
    return next(n for n in range(min(size, limit), 0, -1) if size % n == 0)


def orthonormal(matrix: Array) -> Array:
    """Orthonormal columns that span those of a tall matrix; finite also for a zero matrix."""
    return jnp.linalg.qr(matrix)[0]
