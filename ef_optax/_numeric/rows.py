"""A leaf as the rows of its last axis."""

from __future__ import annotations

from ef_optax._numeric.dtypes import Array, scale_dtype
from ef_optax._numeric.shapes import Shape, size_of


def row_length(shape: Shape) -> int:
    """Length of the last axis; 1 for a scalar.

    >>> row_length((3, 4)), row_length(()), row_length(7)
    (4, 1, 7)
    """
    return shape if isinstance(shape, int) else (shape[-1] if shape else 1)


def row_count(shape: Shape) -> int:
    """Number of rows along the last axis; 0 for an empty leaf.

    >>> row_count((3, 4)), row_count(()), row_count((0,))
    (3, 1, 0)
    """
    size = size_of(shape)
    return size // row_length(shape) if size else 0


def _rows(x: Array) -> Array:
    return x.reshape(row_count(x.shape), row_length(x.shape)).astype(scale_dtype(x.dtype))
