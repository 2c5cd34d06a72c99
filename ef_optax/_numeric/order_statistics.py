"""Entries of given ranks, exactly, by counting digits and not by a sort.

The bit patterns of floats, with the negative ones turned round, are integers in the same order. The
leading 16 bits of all of them are counted; the count tells in which of 65,536 cells each rank lies.
Of those cells alone the next 8 bits are counted, and then the last 8.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array

# Up to this size a sort is as fast and compiles faster.
_SORT_SIZE = 1 << 16
# Up to so many ranks: each has 256 counters.
_MOST_RANKS = 1 << 12
_CELLS, _DIGITS = 1 << 16, 1 << 8


def order_statistics(x: Array, ranks: np.ndarray) -> Array:
    """The entries of the given ranks.

    Args:
      x: shape (d,), floating.
      ranks: static, ascending, in 0 ... d - 1; rank 0 is the smallest entry.

    Returns:
      Shape (len(ranks),). A zero may come with the other sign.

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
    places, number = found, _CELLS
    for shift in (8, 0):
        # Ranks in one cell share a row of counters, that of the first of them; all other entries
        # are counted in a row of their own, which nobody reads.
        rows = jnp.full(number, len(ranks), jnp.uint32)
        rows = rows.at[places].min(jnp.arange(len(ranks), dtype=jnp.uint32))
        cells = rows[cells] * np.uint32(_DIGITS) + ((keys >> shift) & np.uint32(_DIGITS - 1))
        number = (len(ranks) + 1) * _DIGITS
        counts = jnp.zeros(number, jnp.uint32).at[cells].add(np.uint32(1))
        row = rows[places]
        digits, left = _digits(counts.reshape(-1, _DIGITS)[row], left)
        places = row * np.uint32(_DIGITS) + digits
        found = (found << 8) | digits
    return _from_ascending(found)


def _digits(counts: Array, ranks: Array) -> tuple[Array, Array]:
    """The digit at which each rank lies, and its rank among those of that digit.

    Args:
      counts: how often each digit occurs, one row for each rank or one for all.
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
    """uint32 in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _from_ascending(keys: Array) -> Array:
    bits = jnp.where(keys >> 31 == 1, keys & np.uint32((1 << 31) - 1), ~keys)
    return lax.bitcast_convert_type(bits, jnp.float32)
