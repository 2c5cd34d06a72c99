"""Positions as data, so that one program cuts out all pieces of equal size.

A compiler makes a kernel for every slice with different constants, so splitting a buffer into the
leaves of a model is most of what there is to compile. If the positions are arrays, slices of equal
size are the same program, which XLA compiles once.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from ef_optax._numeric.buffers import in_buffers

Array = jax.Array


def as_data(values: Sequence[int], runtime: Array) -> Sequence[Array | int]:
    """The integers as int32 scalars whose values the compiler does not know.

    XLA does not specialise kernels to values in buffers of their own. Only on a CPU are they made
    so (see :func:`in_buffers`); elsewhere they stay constants.

    Args:
      values: non-negative integers below ``2**31``.
      runtime: any integer scalar that is computed at run time. The results vary over the mesh, and
        over a ``vmap``, as it does. If it is not traced, the program is not compiled as one, and
        the integers are returned unchanged.
    """
    if not isinstance(runtime, Tracer):
        return values
    typed = (runtime & 0).astype(jnp.int32)

    constants = in_buffers(lambda: [jnp.int32(v) for v in values], runtime)
    return [typed + v for v in constants]


def starts(
    sizes: Sequence[int], kinds: Sequence[Hashable], runtime: Array | None
) -> list[Array | int]:
    """Where pieces of the given sizes begin if they follow each other.

    If ``runtime`` is given, the starts of pieces of the same kind are data (see :func:`as_data`).
    A piece that is the only one of its kind shares no program, so its start is a Python integer.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    where: list[Array | int] = list(ends[:-1])
    count = collections.Counter(kinds)
    shared = [i for i, kind in enumerate(kinds) if count[kind] > 1 and sizes[i]]
    if runtime is not None and shared and ends[-1] < 1 << 31:
        for i, start in zip(shared, as_data([ends[i] for i in shared], runtime), strict=True):
            where[i] = start
    return where


def pieces(vector: Array, likes: Sequence[Any], where: Sequence[Array | int]) -> list[Array]:
    """Arrays of the shapes of ``likes`` that begin at these positions of a vector.

    Those of equal size share a program if the positions are data (see :func:`as_data`).

    >>> [x.tolist() for x in pieces(jnp.arange(6), (jnp.zeros(2), jnp.zeros((2, 2))), (0, 2))]
    [[0, 1], [[2, 3], [4, 5]]]
    """
    cuts = zip(where, likes, strict=True)
    return [piece(vector, at, x.size).reshape(x.shape) for at, x in cuts]


def piece(vector: Array, at: Array | int, size: int) -> Array:
    """``size`` numbers of a vector from a position on, which is not negative.

    JAX's own slice also accepts positions that count from the end, which takes five more equations.

    >>> piece(jnp.arange(6), 2, 3).tolist()
    [2, 3, 4]
    """
    return lax.dynamic_slice(vector, (at,), (size,), allow_negative_indices=False)


def written(vector: Array, at: Array | int, part: Array) -> Array:
    """A vector with ``part`` at a position, which is not negative.

    >>> written(jnp.arange(4), 1, jnp.array([7, 8])).tolist()
    [0, 7, 8, 3]
    """
    return lax.dynamic_update_slice(vector, part, (at,), allow_negative_indices=False)


def rows(array: Array, at: Array | int, count: int) -> Array:
    """``count`` rows of an array from a number on, which is not negative.

    >>> rows(jnp.arange(6).reshape(3, 2), 1, 2).tolist()
    [[2, 3], [4, 5]]
    """
    return lax.dynamic_slice_in_dim(array, at, count, allow_negative_indices=False)


def row(array: Array, at: Array | int) -> Array:
    """A row of an array, whose number is not negative.

    >>> row(jnp.arange(4).reshape(2, 2), 1).tolist()
    [2, 3]
    """
    return lax.dynamic_index_in_dim(array, at, keepdims=False, allow_negative_indices=False)


def begins(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin if they follow each other.

    >>> begins((2, 3, 1))
    [0, 2, 5]
    """
    return list(itertools.accumulate(sizes, initial=0))[:-1]
