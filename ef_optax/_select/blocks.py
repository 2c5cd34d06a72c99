"""The k entries of largest magnitude in each block, exactly, without sorting.

This is the search of `ef_optax._select.leaf` in all blocks at once. The first threshold is a proven
bound and not a guess from a sample: a block is cut into groups, and at least k entries reach the
k-th largest of the groups' maxima. With six times more groups than k, only a few more entries do.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits.bitmask import count_ones, pack_at_least, positions
from ef_optax._bits.packing import WORD_BITS
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._select import leaf as leaf_select
from ef_optax._select.leaf import top_k_indices
from ef_optax._select.search import at_least, cut, largest_of_first, search

# The least number of groups per kept entry: with more groups the bound is tighter, but there are
# more maxima.
_GROUPS = 6
# The capacity exceeds the expected number of entries above the bound by this many standard
# deviations. A block with more entries costs more passes over all, but never a wrong result.
_MARGIN = 6.0


def block_top_k_indices(x: jax.Array, length: int, k: int) -> jax.Array:
    """Indices in each block of its ``k`` largest magnitudes, ascending.

    Ties go to the lowest index.

    Args:
      x: floating array of shape (d,). Entries after the last full block are not read.
      length: static length of a block.
      k: static number of entries of each block, ``0 <= k <= length``.

    Returns:
      int32 of shape (d // length, k).

    Raises:
      ValueError: if ``k`` is not in ``0 ... length`` or ``x`` is not one-dimensional.

    Example:
      >>> block_top_k_indices(jnp.array([1.0, -3.0, 2.0, 0.0, 0.0, -1.0]), 3, 2).tolist()
      [[1, 2], [0, 2]]
    """
    if x.ndim != 1:
        raise ValueError(f"x must be one-dimensional, got shape {x.shape}: flatten it first")
    count = x.size // length
    group = _group(length, k)
    if count * length <= leaf_select.SORT_SIZE or k == 0 or group == 1:
        return jax.vmap(lambda block: top_k_indices(block, k))(_blocks(x, length))
    groups = length // group
    capacity = _capacity(groups, k)

    # A group is strided, so that full registers are compared. Without the barrier the compiler
    # merges this maximum with the largest of each row, and writes out all magnitudes for it.
    order = magnitude_order(_blocks(x, length)).reshape(count, group, groups)
    maxima = lax.optimization_barrier(jnp.max(order, axis=1))

    def bound(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = jnp.max(row) + 1
        return search(at_least(row), k, k + 1, groups, jnp.min(row), high)[0], high

    low, high = jax.vmap(bound)(maxima)
    words = jax.vmap(pack_at_least)(magnitude_order(_blocks(x, length)), low)
    counts = jax.vmap(count_ones)(words)
    starts = jnp.arange(count, dtype=jnp.uint32) * np.uint32(length)

    def search_on() -> jax.Array:
        def one(block: tuple[jax.Array, ...]) -> jax.Array:
            start, threshold, high, words, kept = block
            mask = at_least(lax.dynamic_slice(x, (start,), (length,)))
            before = (threshold, words, kept)
            threshold, found, kept = search(mask, k, capacity, length, high & 0, high, tried=before)
            tied = cut(mask(threshold), mask(threshold + 1), k, k)
            return jnp.where(kept > capacity, tied, found)

        # One block after the other: all at once would need memory for a copy of the leaf, which the
        # program would reserve at every step, even if this branch is not taken.
        return lax.map(one, (starts, low, high, words, counts))

    words = lax.cond(jnp.all(counts <= capacity), lambda: words, search_on)
    kept = jax.vmap(lambda row: positions(row, capacity))(words)
    order = magnitude_order(x.at[kept + starts[:, None]].get(mode="promise_in_bounds"))

    def finish(kept: jax.Array, order: jax.Array, words: jax.Array) -> jax.Array:
        chosen = largest_of_first(order, count_ones(words), k)
        return kept.at[chosen].get(mode="promise_in_bounds")

    return jax.vmap(finish)(kept, order, words).astype(jnp.int32)


def _blocks(x: jax.Array, length: int) -> jax.Array:
    """The full blocks."""
    return x[: x.size // length * length].reshape(-1, length)


def _group(length: int, k: int) -> int:
    """Entries in a group: the largest power of two that leaves enough groups, a multiple of 32."""
    group = 1
    while length % (2 * group * WORD_BITS) == 0 and length // (2 * group) >= _GROUPS * k:
        group *= 2
    return group


def _capacity(groups: int, k: int) -> int:
    """The most entries of a block that are kept at first, a multiple of 32.

    In a random block the share k / groups of the groups reaches the bound, as if each group had a
    Poisson number of entries above it.
    """
    mean = -groups * math.log1p(-(k + 1) / groups)
    most = mean + _MARGIN * math.sqrt(mean - k) + 1
    return math.ceil(most / WORD_BITS) * WORD_BITS
