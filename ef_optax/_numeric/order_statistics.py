"""Entries of given ranks, found exactly by counting digits instead of sorting.

The bit patterns of floats, with those of the negative ones inverted, are integers in the same
order. Counting the leading 16 bits of all entries shows in which of 65,536 cells each rank lies.
Then the next 8 bits of the entries of these cells are counted, and then their last 8.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array

# Up to this size a sort is as fast, and it compiles faster.
_SORT_SIZE = 1 << 16
# For more ranks than this the entries are sorted, because every rank needs 256 counters.
_MOST_RANKS = 1 << 12
_CELLS, _DIGITS = 1 << 16, 1 << 8


def order_statistics(x: Array, ranks: np.ndarray) -> Array:
    """The entries of the given ranks.

    Args:
      x: shape (d,), floating.
      ranks: static, ascending, in 0 ... d - 1; rank 0 is the smallest entry.

    Returns:
      Shape (len(ranks),). The sign of a zero is arbitrary.

    Example:
      >>> order_statistics(jnp.array([3.0, -1.0, 2.0]), np.array([0, 2])).tolist()
      [-1.0, 3.0]
    """
    if x.size <= _SORT_SIZE or len(ranks) > _MOST_RANKS or x.dtype != jnp.float32:
        return jnp.sort(x)[ranks]
    keys, left = _ascending(x), jnp.asarray(ranks, jnp.uint32)
    cells = keys >> 16
    counts = jnp.zeros(_CELLS, jnp.uint32).at[cells].add(np.uint32(1))
    found, left = _digits(counts[None], left)
    slots, number = found, _CELLS
    for shift in (8, 0):
        # Ranks in the same cell share the row of counters of the first of them. The entries of all
        # other cells are counted in one more row, which is not read.
        rows = jnp.full(number, len(ranks), jnp.uint32)
        rows = rows.at[slots].min(jnp.arange(len(ranks), dtype=jnp.uint32))
        cells = rows[cells] * np.uint32(_DIGITS) + ((keys >> shift) & np.uint32(_DIGITS - 1))
        number = (len(ranks) + 1) * _DIGITS
        counts = jnp.zeros(number, jnp.uint32).at[cells].add(np.uint32(1))
        row = rows[slots]
        digits, left = _digits(counts.reshape(-1, _DIGITS)[row], left)
        slots = row * np.uint32(_DIGITS) + digits
        found = (found << 8) | digits
    return _from_ascending(found)


def _digits(counts: Array, ranks: Array) -> tuple[Array, Array]:
    """The digit at which each rank lies, and its rank among the entries with that digit.

    Args:
      counts: how often each digit occurs, with one row per rank or one row for all ranks.
      ranks: uint32, (ranks,).
    """
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.uint32)
    if len(counts) == 1:
        digits = jnp.searchsorted(ends[0], ranks, side="right").astype(jnp.uint32)
        starts = (ends - counts)[0, digits]
    else:
        digits = jnp.sum(ends <= ranks[:, None], axis=1, dtype=jnp.uint32)
        starts = jnp.take_along_axis(ends - counts, digits[:, None], axis=1)[:, 0]
    return digits, ranks - starts


def _ascending(x: Array) -> Array:
    """Floats as uint32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _from_ascending(keys: Array) -> Array:
    bits = jnp.where(keys >> 31 == 1, keys & np.uint32((1 << 31) - 1), ~keys)
    return lax.bitcast_convert_type(bits, jnp.float32)
