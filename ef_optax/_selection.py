"""The k entries of largest magnitude, exactly, without sorting.

Magnitudes are compared as integers: the bit pattern of a float without its sign bit grows with the
magnitude, orders denormals that the processor may flush to zero, and puts inf and then NaN above
everything. Ties go to the lowest index, so the selected set is that of a stable sort by falling
magnitude.

A large leaf is read a few times in a straight line and never sorted. One search for a threshold is
used three times: on a small sample, for a guess of the k-th magnitude; on everything, where usually
the first probe already keeps k entries and a few more; and on those that were kept, for the exact
k-th magnitude. What a probe keeps is written as one bit an entry, and the entries kept are found
from the words by rank and select.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bitmask import count_ones, first_ones, pack_at_least, positions
from ef_optax._packing import packed_words

# Below this size one call of the backend's partial sort is as fast, and compiles faster.
SORT_SIZE = 1 << 16
# Entries sampled for the first guess.
_SAMPLE = 1 << 17
# Standard deviations of a sampled rank that the guess stays clear of a miss, on either side. A miss
# costs another pass over the leaf, never a wrong result.
_MARGIN = 3.0


def magnitude_order(x: jax.Array) -> jax.Array:
    """Maps a float array to integers that are ordered as ``|x|`` is.

    Args:
      x: floating array of any shape.

    Returns:
      Signed integers of the same width and shape, none negative.

    Example:
      >>> order = magnitude_order(jnp.array([-2.0, 1.0, 0.0, -0.0]))
      >>> bool(order[0] > order[1]), order[2:].tolist()
      (True, [0, 0])
    """
    integer = jnp.dtype(f"int{x.dtype.itemsize * 8}")
    return lax.bitcast_convert_type(x, integer) & jnp.asarray(jnp.iinfo(integer).max, integer)


def top_k_indices(x: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` largest magnitudes, ascending; ties go to the lowest index.

    Args:
      x: floating array of shape (d,).
      k: static number of entries, ``0 <= k <= d``.

    Returns:
      int32 of shape (k,), or uint32 where ``d`` is above ``2**31``.

    Raises:
      ValueError: if ``k`` is not in ``0 ... d`` or ``x`` is not one-dimensional.

    Example:
      >>> top_k_indices(jnp.array([1.0, -3.0, 2.0, 3.0]), 2).tolist()
      [1, 3]
    """
    if x.ndim != 1:
        raise ValueError(f"x must be one-dimensional, got shape {x.shape}: flatten it first")
    if not 0 <= k <= x.size:
        raise ValueError(f"k must be between 0 and the size {x.size}, got {k}")
    dtype = jnp.int32 if x.size <= 1 << 31 else jnp.uint32
    if k == 0 or k == x.size:
        return jnp.arange(k, dtype=dtype)
    if k == 1 and x.size <= SORT_SIZE:  # one pass, and also fast where a sort of 64 bits is slow
        return jnp.argmax(magnitude_order(x))[None].astype(dtype)
    if x.size <= SORT_SIZE:
        return jnp.sort(lax.top_k(_as_normal_floats(magnitude_order(x)), k)[1])
    sample = min(_SAMPLE, x.size // 16)
    low_rank, high_rank, capacity = _plan(x.size, k, sample)
    top = jnp.asarray(jnp.iinfo(magnitude_order(x[:0]).dtype).max)
    everything = at_least(x)
    if 2 * capacity > x.size:
        zero = magnitude_order(x[0]) & 0
        threshold, _, _ = search(everything, k, k, x.size, zero, zero + top)
        return positions(cut(everything, k, threshold), k).astype(dtype)

    drawn = magnitude_order(_draw(x, sample))
    low, high = jnp.min(drawn), jnp.max(drawn) + 1
    guess, _, _ = search(at_least(drawn), low_rank, high_rank, sample, low, high)
    zero = guess & 0
    words = everything(guess)
    count = count_ones(words)

    def search_on() -> jax.Array:
        threshold, found, kept = search(
            everything, k, capacity, x.size, zero, zero + top, tried=(guess, words, count)
        )
        # More than the capacity are kept only if that many are equal: these are cut by index.
        return lax.cond(kept > capacity, lambda: cut(everything, k, threshold), lambda: found)

    # No loop over the leaf unless it is needed: the caller may want to update the leaf in place,
    # and a loop would make the compiler copy it first.
    words = lax.cond((count >= k) & (count <= capacity), lambda: words, search_on)
    kept = positions(words, capacity)
    order = magnitude_order(x.at[kept].get(mode="promise_in_bounds"))
    chosen = largest_of_first(order, count_ones(words), k)
    return kept.at[chosen].get(mode="promise_in_bounds").astype(dtype)


def _as_normal_floats(order: jax.Array) -> jax.Array:
    """Maps integers, none negative, to floats in the same order, none of them denormal or NaN.

    Backends have a fast partial sort for float32 only.
    """
    if order.dtype.itemsize < 4:
        return order.astype(jnp.float32)
    if order.dtype.itemsize > 4:
        return order
    half, least = np.int32(1 << 30), np.int32(1 << 23)
    above = order - half + least
    below = (half - 1 - order + least) | np.int32(-(1 << 31))
    return lax.bitcast_convert_type(jnp.where(order >= half, above, below), jnp.float32)


def at_least(x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The packed mask of the entries at or above a threshold, as a function of the threshold."""

    def mask(threshold: jax.Array) -> jax.Array:
        # Tied to the threshold, so that the compiler does not lift the magnitudes out of a loop
        # over thresholds and write them all to memory.
        entries, threshold = lax.optimization_barrier((x, threshold))
        if jnp.issubdtype(entries.dtype, jnp.floating):
            entries = magnitude_order(entries)
        return pack_at_least(entries, threshold)

    return mask


def largest_of_first(order: jax.Array, count: jax.Array, k: int) -> jax.Array:
    """Positions of the ``k`` largest of the first ``count`` integers; ties to the lowest.

    Args:
      order: integers, none negative, of shape (capacity,).
      count: uint32 scalar, ``k`` at least.
      k: static.
    """
    real = jnp.arange(order.size, dtype=jnp.uint32) < count
    low = jnp.min(jnp.where(real, order, jnp.iinfo(order.dtype).max))
    order = jnp.where(real, order, jnp.asarray(-1, order.dtype))
    mask = at_least(order)
    threshold, _, _ = search(mask, k, k, order.size, low, jnp.max(order) + 1, kept=count)
    return positions(cut(mask, k, threshold), k)


def cut(at_least: Callable[[jax.Array], jax.Array], k: int, threshold: jax.Array) -> jax.Array:
    """Mask of the entries above a threshold and of its first ties, ``k`` in all."""
    above = at_least(threshold + 1)
    ties = at_least(threshold) ^ above
    return above | first_ones(ties, np.uint32(k) - count_ones(above), k)


def _plan(size: int, k: int, sample: int) -> tuple[int, int, int]:
    """Ranks in the sample between which the guess must fall, and the capacity for what it keeps."""
    rank = k * sample / size
    low = math.ceil(rank + _MARGIN * (math.sqrt(rank) + 1))
    high = math.ceil(low + math.sqrt(low) / 2)
    kept = (high + _MARGIN * (math.sqrt(high) + 1)) * size / sample
    return min(low, sample), min(high, sample), min(math.ceil(kept), size)


def _draw(x: jax.Array, count: int) -> jax.Array:
    """One entry of each of ``count`` equal stretches, its place scrambled against periodic data."""
    stride = x.size // count
    index = jnp.arange(count, dtype=jnp.uint32)
    place = ((index * np.uint32(2654435769)) >> np.uint32(16)) % np.uint32(stride)
    return x.at[index * np.uint32(stride) + place].get(mode="promise_in_bounds")


def search(
    at_least: Callable[[jax.Array], jax.Array],
    fewest: int,
    most: int,
    size: int,
    low: jax.Array,
    high: jax.Array,
    kept: jax.Array | None = None,
    tried: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds a threshold that keeps between ``fewest`` and ``most`` of ``size`` entries.

    Interpolation and bisection in turn, on the integers: about twelve probes on smooth data, twice
    the bits at worst. After a first try the steps grow by sixteen, so that a near miss stays cheap
    and the first step, of one, settles a tie.

    Args:
      at_least: maps a threshold to the packed mask of the entries at or above it.
      fewest: entries to keep at least.
      most: entries to keep at most.
      size: entries in all.
      low: a threshold that keeps enough.
      high: a threshold that keeps too few.
      kept: how many the threshold ``low`` keeps; all unless given.
      tried: a threshold between them, its mask and how many it keeps.

    Returns:
      The threshold, its mask and how many it keeps. More than ``most`` are kept only where the
      threshold is the integer of rank ``fewest`` itself; the mask is then another threshold's.
    """
    top = jnp.asarray(jnp.iinfo(low.dtype).max)

    def undecided(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, kept, *_ = state
        return (kept > most) & (high - low > 1)

    def probe(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, kept, missed, threshold, step, halve, _ = state
        part = (kept - fewest).astype(jnp.float32) / (kept - missed).astype(jnp.float32)
        part = ((high - low).astype(jnp.float32) * jnp.where(halve, 0.5, part)).astype(low.dtype)
        part = jnp.clip(part, 1, high - low - 1)
        threshold = jnp.where(
            threshold == low,
            low + jnp.minimum(part, step),
            high - jnp.minimum(high - low - part, step),
        )
        step = jnp.where(step > top // 16, top, step * 16)
        words = at_least(threshold)
        bounds = narrowed(low, high, kept, missed, threshold, count_ones(words))
        return *bounds, threshold, step, ~halve, words

    def narrowed(
        low: jax.Array,
        high: jax.Array,
        kept: jax.Array,
        missed: jax.Array,
        threshold: jax.Array,
        found: jax.Array,
    ) -> tuple[jax.Array, ...]:
        enough = found >= fewest
        low, kept = jnp.where(enough, threshold, low), jnp.where(enough, found, kept)
        high, missed = jnp.where(enough, high, threshold), jnp.where(enough, missed, found)
        return low, high, kept, missed

    # The carry is made from the bounds, so that it varies over the mesh as the entries do.
    zero = low & 0
    none = zero.astype(jnp.uint32)
    bounds = (low, high, none + np.uint32(size) if kept is None else kept, none)
    threshold, step = low, zero + top
    words = jnp.broadcast_to(none, (packed_words(size, 1),))
    if tried is not None:
        threshold, words, found = tried
        bounds, step = narrowed(*bounds, threshold, found), zero + 1
    state = (*bounds, threshold, step, zero != 0, words)
    low, _, kept, _, _, _, _, words = lax.while_loop(undecided, probe, state)
    return low, words, kept
