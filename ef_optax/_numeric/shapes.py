"""Shapes of leaves, and how many entries they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Shape = int | Sequence[int]
"""The shape of a leaf; an integer counts as a one-dimensional shape."""


def like_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, without the array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def size_of(shape: Shape) -> int:
    """Number of elements of a shape; an integer counts as a one-dimensional shape.

    >>> size_of((3, 4)), size_of(()), size_of(7)
    (12, 1, 7)
    """
    return int(shape) if isinstance(shape, int | np.integer) else int(np.prod(shape, dtype=int))


def bits_for(count: int) -> int:
    """Width of a field that can hold ``count`` different values, ``ceil(log2 count)``.

    Args:
      count: the number of values, which are ``0 ... count - 1``.

    Returns:
      The number of bits; 0 for ``count <= 1``, when the value is known.

    Example:
      >>> [bits_for(count) for count in (0, 1, 2, 3, 4096, 4097)]
      [0, 0, 1, 2, 12, 13]
    """
    return max(0, count - 1).bit_length()
