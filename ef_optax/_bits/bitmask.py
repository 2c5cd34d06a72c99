"""Masks with one bit per entry: how their set bits are packed, counted, cut and listed.

A mask over d entries has d / 32 words in the order of `ef_optax._bits.packing`. Everything after
packing works on words by rank and select, so it reads one word for 32 entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits.packing import WORD_BITS, pack

# Words that are counted together: four counts of at most 32, and their sums, fit into the bytes of
# one word.
_GROUP = 4
# Entries that a running sum adds together, as one row of a matrix product.
_ROW = 64
# Up to this value every integer is a float32, and sums of such integers are exact.
_EXACT = 1 << 24


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs a boolean vector, with one bit per entry.

    Example:
      >>> pack_mask(jnp.array([True, False, True])).tolist()
      [5]
    """
    return pack(mask.astype(jnp.uint32), 1)


def pack_at_least(entries: jax.Array, threshold: jax.Array) -> jax.Array:
    """Packs the mask ``entries >= threshold`` of integers, as `pack_mask` would.

    The bit is the sign of a difference, because compilers turn this into vector code. They often do
    not for a comparison whose result is shifted.

    Args:
      entries: signed integers of shape (count,), none below -1.
      threshold: scalar of the same dtype, not negative. The largest integer plus 1, which wraps
        around, sets no bit.

    Example:
      >>> pack_at_least(jnp.array([7, 2, 5]), jnp.array(5)).tolist()
      [5]
    """
    width = entries.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    difference = threshold - jnp.ones((), entries.dtype) - entries
    return pack(difference.astype(unsigned) >> np.array(width - 1, unsigned), 1)


def count_ones(words: jax.Array) -> jax.Array:
    """Number of set bits, a uint32 scalar.

    Example:
      >>> count_ones(jnp.array([5, 1], jnp.uint32)).item()
      3
    """
    return jnp.sum(lax.population_count(words), dtype=jnp.uint32)


def first_ones(words: jax.Array, limit: jax.Array, most: int) -> jax.Array:
    """Keeps the lowest ``limit`` set bits of a mask and clears the others.

    Args:
      words: uint32 of shape (w,), a packed mask.
      limit: uint32 scalar.
      most: static bound on ``limit``.

    Returns:
      The mask, of the same shape.

    Example:
      >>> first_ones(jnp.array([7, 3], jnp.uint32), jnp.uint32(4), 4).tolist()
      [7, 1]
    """
    ones = lax.population_count(words)
    ends = running_sum(ones, most)
    cut = _select(words, jnp.minimum(ones + limit - jnp.minimum(ends, limit + ones), ones))
    below = (np.uint32(1) << cut) - np.uint32(1)
    return jnp.where(ends <= limit, words, words & below)


def positions(words: jax.Array, capacity: int) -> jax.Array:
    """Positions of the set bits of a mask, ascending.

    Args:
      words: uint32 of shape (w,), a packed mask.
      capacity: static length of the result.

    Returns:
      uint32 of shape (capacity,). If fewer bits are set, the remaining entries are arbitrary
      positions in the mask; if more are set, only the first ``capacity`` are listed.

    Example:
      >>> positions(jnp.array([5, 1], jnp.uint32), 3).tolist()
      [0, 2, 32]
    """
    words = jnp.concatenate([words, jnp.zeros((-words.size % _GROUP,), jnp.uint32)])
    counts = lax.population_count(words).reshape(-1, _GROUP)
    shifts = 8 * np.arange(_GROUP, dtype=np.uint32)
    # Byte i is the number of bits in the words 0 ... i of the group.
    sums = jnp.sum(counts << shifts, axis=1, dtype=jnp.uint32) * np.uint32(0x01010101)
    ends = running_sum(sums >> np.uint32(24), capacity)
    # Slot j belongs to the group after all those that end at or before j: the ends are marked, and
    # a running sum over the slots counts the groups that are passed.
    passed = jnp.zeros((capacity,), jnp.uint32)
    passed = passed.at[ends].add(np.uint32(1), mode="drop", indices_are_sorted=True)
    group = jnp.minimum(running_sum(passed, ends.size), np.uint32(ends.size - 1))
    sums = sums.at[group].get(mode="promise_in_bounds")
    start = ends.at[group].get(mode="promise_in_bounds") - (sums >> np.uint32(24))
    rank = jnp.arange(capacity, dtype=jnp.uint32) - start
    at = jnp.zeros((capacity,), jnp.uint32)  # the word of each slot, first within its group
    for shift in shifts[:-1]:
        at += (rank >= ((sums >> shift) & np.uint32(255))).astype(jnp.uint32)
    rank -= ((sums << np.uint32(8)) >> (at * np.uint32(8))) & np.uint32(255)
    at += group * np.uint32(_GROUP)
    word = words.at[at].get(mode="promise_in_bounds")
    return at * np.uint32(WORD_BITS) + _select(word, rank)


def running_sum(counts: jax.Array, most: int) -> jax.Array:
    """Inclusive running sum of a vector, by products of short rows with a triangular matrix.

    A row has the sum of all rows before it, and then its own entries; the matrix has ones. On a CPU
    this is several times faster than a scan, and it compiles to a few kernels.

    Args:
      counts: uint32 of shape (count,).
      most: static bound; sums up to it are exact, and larger sums come out larger than it.

    Returns:
      uint32 of shape (count,).

    Example:
      >>> running_sum(jnp.array([1, 0, 2], jnp.uint32), 3).tolist()
      [1, 1, 3]
    """
    if most >= _EXACT:
        return jnp.cumsum(counts, dtype=jnp.uint32)
    return _row_sums(counts.astype(jnp.float32), inclusive=True).astype(jnp.uint32)


def _row_sums(counts: jax.Array, inclusive: bool) -> jax.Array:
    """Running sums in float32, each with its own entry if ``inclusive``, else without."""
    size = counts.size
    width = size if size <= 2 * _ROW else _ROW
    rows = jnp.pad(counts, (0, -size % width)).reshape(-1, width)
    before = jnp.zeros((1,), jnp.float32)
    if len(rows) > 1:
        before = _row_sums(_product(rows, np.ones((width, 1), np.float32))[:, 0], inclusive=False)
    # Clipping prevents overflow. Running sums of non-negative numbers never decrease, even if they
    # are rounded, so a sum beyond the exact integers stays beyond them.
    rows = jnp.minimum(jnp.concatenate([before[:, None], rows], axis=1), np.float32(_EXACT))
    triangle = np.triu(np.ones((width + 1, width), np.float32), -1 if inclusive else 0)
    triangle[0] = 1.0
    return _product(rows, triangle).reshape(-1)[:size]


def _product(rows: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.dot(rows, matrix, precision=lax.Precision.HIGHEST)


def _select(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Position in each word of set bit number ``rank``, from 0; any position if there is none."""
    position = jnp.zeros_like(words)
    for width in (16, 8, 4, 2, 1):
        low = words & np.uint32((1 << width) - 1)
        ones = lax.population_count(low)
        above = rank >= ones
        rank = jnp.where(above, rank - ones, rank)
        position = jnp.where(above, position + np.uint32(width), position)
        words = jnp.where(above, words >> np.uint32(width), low)
    return position
