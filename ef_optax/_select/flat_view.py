"""Several leaves as one vector, read and written in place.

One index names an entry of the vector, in which the leaves follow each other, each in the order of
its memory. If indices are sorted, those of one leaf are neighbours. They are read, or added to, in
windows of fixed width, as many as the leaf needs. So nothing of the size of a leaf is copied, and a
leaf that may be overwritten is updated in place. Small leaves are cheaper to copy than to visit, so
they are joined into a vector of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits.bitmask import running_sum
from ef_optax._numeric import offsets

Array = jax.Array

# Leaves of up to this size are joined.
JOIN_LIMIT = 1 << 16
# Entries of a leaf that are read or written together.
WINDOW = 1 << 11


@dataclasses.dataclass(frozen=True)
class Layout:
    """The positions of the leaves in the vector.

    Attributes:
      sizes: the sizes of the leaves.
      rows: the numbers 0 ... number of leaves, as data (see `ef_optax._numeric.offsets`), so that
        leaves of the same shape share their programs.
      align: every leaf begins at a multiple of this; there may be gaps in between.
    """

    sizes: tuple[int, ...]
    rows: Sequence[Array | int]
    align: int = 1

    @property
    def ends(self) -> list[int]:
        """A zero, and then the first index after each leaf and its gap."""
        return list(itertools.accumulate(self._padded(self.sizes), initial=0))

    @property
    def begins(self) -> dict[int, int]:
        """Where each small leaf begins in the vector of small leaves (see `joined`)."""
        padded = self._padded([self.sizes[i] for i in self.small])
        return dict(zip(self.small, itertools.accumulate(padded, initial=0), strict=False))

    def joined(self, xs: Sequence[Array], dtype: Any) -> Array:
        """The small leaves as one vector, with zeros in the gaps."""
        flats = [xs[i].reshape(-1).astype(dtype) for i in self.small]
        return jnp.concatenate([jnp.pad(x, (0, -x.size % self.align)) for x in flats])

    def _padded(self, sizes: Sequence[int]) -> list[int]:
        return [-(-size // self.align) * self.align for size in sizes]

    def bounds(self, indices: Array) -> Array:
        """How many of the sorted indices are before each leaf, and in total, as int32."""
        ends = np.asarray(self.ends, np.uint32)
        return jnp.searchsorted(indices, ends, method="scan_unrolled").astype(jnp.int32)

    def leaf_of(self, bounds: Array, count: int) -> Array:
        """The leaf of each of ``count`` sorted indices; those beyond the last leaf count as its."""
        passed = jnp.zeros(count, jnp.uint32)
        passed = passed.at[bounds[1:-1]].add(np.uint32(1), mode="drop", indices_are_sorted=True)
        return running_sum(passed, len(self.sizes))

    @property
    def small(self) -> list[int]:
        """The leaves that are joined; empty leaves are not."""
        return [i for i, size in enumerate(self.sizes) if 0 < size <= JOIN_LIMIT]

    @property
    def large(self) -> list[int]:
        """The leaves that are not copied."""
        return [i for i, size in enumerate(self.sizes) if size > JOIN_LIMIT]


# ---------------------------------------------------------------------------- joined


def join(xs: Sequence[Array], dtype: Any) -> Array:
    """The leaves as one vector, copied."""
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in xs])


def split(vector: Array, likes: Sequence[Any]) -> list[Array]:
    """The inverse of `join`: leaves of the shapes and dtypes of ``likes``."""
    begins = offsets.begins([like.size for like in likes])
    return [
        vector[start : start + like.size].reshape(like.shape).astype(like.dtype)
        for start, like in zip(begins, likes, strict=True)
    ]


# ---------------------------------------------------------------------------- in place


def take(xs: Sequence[Array], layout: Layout, indices: Array, dtype: Any) -> Array:
    """The entries at sorted indices.

    Args:
      xs: the leaves, of any shapes.
      layout: their positions.
      indices: uint32 of shape (count,), ascending; if one names no entry, its result is arbitrary.
      dtype: dtype of the result.

    Returns:
      Shape (count,).

    Example:
      >>> xs = [jnp.array([1.0, 2.0]), jnp.array([[3.0], [4.0]])]
      >>> take(xs, Layout((2, 2), range(3)), jnp.array([1, 2], jnp.uint32), jnp.float32).tolist()
      [2.0, 3.0]
    """
    bounds = layout.bounds(indices)
    starts = jnp.asarray(layout.ends[:-1], jnp.uint32)
    padded = jnp.pad(indices, (0, WINDOW))
    # Computed from the indices, so that it varies over the mesh as they do.
    values = jnp.broadcast_to((indices[0] & 0).astype(dtype), padded.shape)
    for i in layout.large:
        first, last = bounds[layout.rows[i]], bounds[layout.rows[i + 1]]
        values = _taken(values, xs[i], padded, starts[layout.rows[i]], first, last)
    values = values[: indices.size]
    if not layout.small:
        return values
    own = _joined_positions(layout, bounds, indices)
    joined = layout.joined(xs, dtype)
    kept = joined.at[jnp.minimum(own, np.uint32(joined.size - 1))].get(mode="promise_in_bounds")
    return jnp.where(own < np.uint32(joined.size), kept, values)


def add(xs: Sequence[Array], layout: Layout, indices: Array, values: Array) -> list[Array]:
    """The leaves with values added at sorted indices, in place if possible.

    Args:
      xs: the leaves, of any shapes.
      layout: their positions.
      indices: uint32 of shape (n, count), each row ascending.
      values: shape (n, count).

    Returns:
      The leaves.

    Example:
      >>> xs = [jnp.array([1.0, 2.0]), jnp.array([[3.0], [4.0]])]
      >>> indices, values = jnp.array([[1, 2]], jnp.uint32), jnp.array([[10.0, 20.0]])
      >>> [x.tolist() for x in add(xs, Layout((2, 2), range(3)), indices, values)]
      [[1.0, 12.0], [[23.0], [4.0]]]
    """
    bounds = jax.vmap(layout.bounds)(indices)
    starts = jnp.asarray(layout.ends[:-1], jnp.uint32)
    out = list(xs)
    nowhere = np.uint32((1 << 32) - 1)
    padded = (
        jnp.pad(indices, ((0, 0), (0, WINDOW)), constant_values=nowhere),
        jnp.pad(values, ((0, 0), (0, WINDOW))),
    )
    for i in layout.large:
        row, after = layout.rows[i], layout.rows[i + 1]
        out[i] = _added(xs[i], *padded, starts[row], bounds[:, row], bounds[:, after])
    if layout.small:
        own = jax.vmap(lambda b, at: _joined_positions(layout, b, at))(bounds, indices)
        joined = layout.joined(xs, values.dtype)
        joined = joined.at[own.reshape(-1)].add(values.reshape(-1), mode="drop")
        begins = jnp.asarray(list(layout.begins.values()), jnp.int32)
        for j, i in enumerate(layout.small):
            part = offsets.piece(joined, begins[layout.rows[j]], xs[i].size)
            out[i] = part.reshape(xs[i].shape).astype(xs[i].dtype)
    return out


def _joined_positions(layout: Layout, bounds: Array, indices: Array) -> Array:
    """The positions of small leaves' entries in their joined vector; beyond it for all others."""
    begins = layout.begins
    # What is added to an index of the leaf, modulo 2**32.
    shifts = [begins.get(i, 0) - start for i, start in enumerate(layout.ends[:-1])]
    table = np.asarray([shift % (1 << 32) for shift in shifts], np.uint32)
    is_small = np.asarray([i in begins for i in range(len(layout.sizes))])
    leaf = layout.leaf_of(bounds, indices.size)
    beyond = np.uint32((1 << 32) - 1)
    return jnp.where(jnp.asarray(is_small)[leaf], indices + jnp.asarray(table)[leaf], beyond)


@jax.jit
def _taken(
    values: Array, x: Array, indices: Array, start: Array, first: Array, last: Array
) -> Array:
    """Writes a leaf's entries to slots ``first`` to ``last`` of ``values``.

    Later slots may be overwritten with other values.
    """
    flat = x.reshape(-1)

    def one(slot: Array, values: Array) -> Array:
        own = lax.dynamic_slice(indices, (slot,), (WINDOW,)) - start
        own = jnp.minimum(own, np.uint32(flat.size - 1))
        kept = flat.at[own].get(mode="promise_in_bounds").astype(values.dtype)
        return lax.dynamic_update_slice(values, kept, (slot,))

    return _windows(first, last, one, values)


@jax.jit
def _added(
    x: Array, indices: Array, values: Array, start: Array, first: Array, last: Array
) -> Array:
    """A leaf with the values of its slots added; all arguments but x and start have n rows."""

    def of_row(row: Array | int, x: Array) -> Array:
        def one(slot: Array, x: Array) -> Array:
            # Indices of other leaves, or of none, in the window are beyond the end of this leaf.
            own = lax.dynamic_slice(indices, (row, slot), (1, WINDOW))[0] - start
            change = lax.dynamic_slice(values, (row, slot), (1, WINDOW))[0]
            return add_at(x, own, change)

        return _windows(first[row], last[row], one, x)

    if len(indices) == 1:
        return of_row(0, x)
    return lax.fori_loop(0, len(indices), of_row, x)


def _windows(
    first: Array, last: Array, one: Callable[[Array, Array], Array], carry: Array
) -> Array:
    """Visits the slots from ``first`` to ``last``, one window at a time."""

    def visit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        slot, carry = state
        return slot + WINDOW, one(slot, carry)

    return lax.while_loop(lambda state: state[0] < last, visit, (first, carry))[1]


def add_at(x: Array, indices: Array, values: Array) -> Array:
    """Adds values at flat indices of an array of any shape; an index beyond the end is dropped.

    The array is not flattened for this. If a program needs both a vector of the entries and the
    array, the compiler writes both, and neither over a donated argument.

    Example:
      >>> add_at(jnp.zeros((2, 2)), jnp.array([3, 0, 4]), jnp.array([1.0, 2.0, 5.0])).tolist()
      [[2.0, 0.0], [0.0, 1.0]]
    """
    if x.ndim == 0:
        return add_at(x[None], indices, values)[0]
    if not x.size:
        return x
    coordinates = []
    for size in x.shape[:0:-1]:
        length = jnp.asarray(size, indices.dtype)
        coordinates.append(lax.rem(indices, length))
        indices = lax.div(indices, length)
    return x.at[(indices, *coordinates[::-1])].add(values.astype(x.dtype), mode="drop")
