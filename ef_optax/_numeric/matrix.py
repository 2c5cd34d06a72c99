"""Leaves as matrices: what every codec means by row, column and rank.

A leaf with two or more axes is the matrix (all but the last axis) x (last axis): inputs by outputs
for dense layers, (height, width, inputs) by outputs for convolutions as Flax stores them. Layers
that are stacked for a scan have leading axes that are not part of the matrix: ``batch_axes`` counts
these, and the leaf has one matrix for each of their indices. Leaves with fewer axes have no matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.linear import matmul
from ef_optax._numeric.shapes import Shape

UNROLL_RANK = 8
"""Up to this rank, a product of factors is a sum of outer products, which the compiler fuses."""


class Matrices(NamedTuple):
    """A leaf as matrices of one shape."""

    lead: tuple[int, ...]  # shape of the batch axes, () for a single matrix
    rows: int
    columns: int

    @property
    def number(self) -> int:
        """Number of matrices."""
        return math.prod(self.lead)


def matrix_view(shape: Shape, batch_axes: int = 0) -> Matrices | None:
    """The matrices of a leaf, or None if it has none or is empty.

    >>> matrix_view((3, 3, 16, 32))
    Matrices(lead=(), rows=144, columns=32)
    >>> matrix_view((12, 64, 32), batch_axes=1)
    Matrices(lead=(12,), rows=64, columns=32)
    >>> matrix_view((7,)), matrix_view((12, 64), batch_axes=1), matrix_view((0, 4))
    (None, None, None)
    """
    if isinstance(shape, int) or len(shape) < 2 + batch_axes or 0 in shape:
        return None
    return Matrices(tuple(shape[:batch_axes]), math.prod(shape[batch_axes:-1]), shape[-1])


def thin_rows(x: Array, batch_axes: int = 0) -> Array:
    """The matrices of a leaf with the shorter side as rows, in float32 or wider.

    They are transposed if they have as many columns as rows, or fewer: (matrices, shorter, longer).

    >>> thin_rows(jnp.arange(6).reshape(3, 2) / 1.0).tolist()
    [[[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]]
    """
    rows, columns = math.prod(x.shape[batch_axes:-1]), x.shape[-1]
    wide = x.astype(wide_dtype(x.dtype)).reshape(math.prod(x.shape[:batch_axes]), rows, columns)
    return jnp.swapaxes(wide, 1, 2) if columns <= rows else wide


def from_thin_rows(rows: Array, like: jax.ShapeDtypeStruct, batch_axes: int = 0) -> Array:
    """The inverse of :func:`thin_rows`."""
    across = like.shape[-1] <= math.prod(like.shape[batch_axes:-1])
    rows = jnp.swapaxes(rows, 1, 2) if across else rows
    return rows.reshape(like.shape).astype(like.dtype)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``.

    >>> largest_divisor(96, 64), largest_divisor(7, 4)
    (48, 1)
    """
    return next(n for n in range(min(size, limit), 0, -1) if size % n == 0)


def orthonormal(matrix: Array) -> Array:
    """Orthonormal columns that span those of tall matrices, with some completion if they depend.

    Householder's QR is finite for a zero matrix and always gives all columns, so that a direction
    that is zero in one step is not lost for the next ones.
    """
    return jnp.linalg.qr(matrix)[0]


def low_rank_product(left: Array, right: Array) -> Array:
    """``left @ right`` for (..., rows, r) and (..., r, columns)."""
    rank = left.shape[-1]
    if rank > UNROLL_RANK:
        return matmul(left, right)
    terms = [left[..., :, j, None] * right[..., j, None, :] for j in range(rank)]
    return sum(terms[1:], terms[0])
