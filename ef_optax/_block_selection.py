"""The k entries of largest magnitude in each block, exactly, without sorting.

The search of `ef_optax._selection`, in all blocks at once. The first threshold comes from a proof,
not from a sample: a block is cut into groups, and at least k entries reach the k-th largest of the
groups' maxima. With three times more groups than k few entries more do.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ef_optax import _selection
from ef_optax._bitmask import count_ones, positions
from ef_optax._packing import WORD_BITS
from ef_optax._selection import at_least, cut, largest, magnitude_order, search, top_k_indices

# Groups per kept entry, at least: more make the bound tighter and the maxima more.
_GROUPS = 3
# Standard deviations of the number of entries above the bound for which there is room. A block
# without room costs more passes over all, never a wrong result.
_MARGIN = 6.0


def block_top_k_indices(blocks: jax.Array, k: int) -> jax.Array:
    """Indices in each block of its ``k`` largest magnitudes, ascending; ties to the lowest index.

    Args:
      blocks: floating array of shape (blocks, length).
      k: static number of entries of each block, ``0 <= k <= length``.

    Returns:
      int32 of shape (blocks, k).

    Raises:
      ValueError: if ``k`` is not in ``0 ... length`` or ``blocks`` is not two-dimensional.

    Example:
      >>> block_top_k_indices(jnp.array([[1.0, -3.0, 2.0], [0.0, 0.0, -1.0]]), 2).tolist()
      [[1, 2], [0, 2]]
    """
    if blocks.ndim != 2:
        raise ValueError(f"blocks must be (blocks, length), got shape {blocks.shape}: reshape them")
    length = blocks.shape[1]
    group = _group(length, k)
    small = blocks.size <= _selection.SORT_SIZE
    if small or k == 0 or group == 1:
        return jax.vmap(lambda block: top_k_indices(block, k))(blocks)
    groups = length // group
    capacity = _capacity(groups, k)

    # A group is strided, so that whole registers are compared, and its maximum is written out, so
    # that the compiler makes one loop of it.
    maxima = functools.reduce(
        jnp.maximum,
        (magnitude_order(blocks[:, i : i + groups]) for i in range(0, length, groups)),
    )
    above = jnp.max(maxima, axis=1) + 1

    def bound(row: jax.Array, high: jax.Array) -> jax.Array:
        return search(at_least(row), k, k + k // 16 + 1, groups, high & 0, high)[0]

    low = jax.vmap(bound)(maxima, above)
    words = jax.vmap(lambda block, threshold: at_least(block)(threshold))(blocks, low)
    counts = jax.vmap(count_ones)(words)

    def search_on() -> jax.Array:
        def one(
            block: jax.Array, threshold: jax.Array, high: jax.Array, *tried: jax.Array
        ) -> jax.Array:
            mask = at_least(block)
            threshold, found, kept = search(
                mask, k, capacity, length, high & 0, high, tried=(threshold, *tried)
            )
            return jnp.where(kept > capacity, cut(mask, k, threshold), found)

        return jax.vmap(one)(blocks, low, above, words, counts)

    words = lax.cond(jnp.all(counts <= capacity), lambda: words, search_on)

    def finish(block: jax.Array, words: jax.Array, low: jax.Array) -> jax.Array:
        kept = positions(words, capacity)
        real = jnp.arange(capacity, dtype=jnp.uint32) < count_ones(words)
        order = magnitude_order(block.at[kept].get(mode="promise_in_bounds"))
        order = jnp.where(real, order, jnp.asarray(-1, order.dtype))
        high = jnp.max(order) + 1
        chosen = largest(at_least(order), k, capacity, low, high)
        return kept.at[chosen].get(mode="promise_in_bounds")

    return jax.vmap(finish)(blocks, words, low).astype(jnp.int32)


def _group(length: int, k: int) -> int:
    """Entries in a group: the largest power of two that leaves enough groups, in whole words."""
    group = 1
    while length % (2 * group * WORD_BITS) == 0 and length // (2 * group) >= _GROUPS * k:
        group *= 2
    return group


def _capacity(groups: int, k: int) -> int:
    """Entries of a block for which there is room, in whole words.

    Of a random block the share k / groups of the groups reach the bound, as if each had a Poisson
    number of entries above it.
    """
    mean = -groups * math.log1p(-(k + k // 16 + 1) / groups)
    room = mean + _MARGIN * math.sqrt(mean - k) + 1
    return math.ceil(room / WORD_BITS) * WORD_BITS
