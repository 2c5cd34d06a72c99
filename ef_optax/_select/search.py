"""Thresholds on magnitudes: their masks, and a search for one that keeps a given number of entries.

Magnitudes are compared as integers: the bit pattern of a float without its sign bit grows with the
magnitude, orders denormals that the processor may flush to zero, and puts inf and then NaN above
all others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ef_optax._bits.bitmask import count_ones, first_ones, pack_at_least, positions
from ef_optax._numeric.magnitude import magnitude_order


def at_least(x: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The packed mask of the entries at or above a threshold, as a function of the threshold."""

    def mask(threshold: jax.Array) -> jax.Array:
        # The barrier ties the entries to the threshold. Otherwise the compiler moves the magnitudes
        # out of a loop over thresholds and writes them all to memory.
        entries, threshold = lax.optimization_barrier((x, threshold))
        if jnp.issubdtype(entries.dtype, jnp.floating):
            entries = magnitude_order(entries)
        return pack_at_least(entries, threshold)

    return mask


def largest_of_first(
    order: jax.Array, count: jax.Array, k: jax.Array | int, most: int | None = None
) -> jax.Array:
    """Positions of the ``k`` largest of the first ``count`` integers; ties go to the lowest.

    Args:
      order: non-negative integers of shape (capacity,).
      count: uint32 scalar, at least ``k``.
      k: an integer, or a uint32 scalar that is known only at run time.
      most: static bound on ``k``, needed if that is an array.

    Returns:
      uint32 of shape (most,), ascending; positions after the first ``k`` are arbitrary.
    """
    most = int(k) if most is None else most
    real = jnp.arange(order.size, dtype=jnp.uint32) < count
    low = jnp.min(jnp.where(real, order, jnp.iinfo(order.dtype).max))
    order = jnp.where(real, order, jnp.asarray(-1, order.dtype))
    mask = at_least(order)
    threshold, _, _ = search(mask, k, k, order.size, low, jnp.max(order) + 1, kept=count)
    return positions(cut(mask(threshold), mask(threshold + 1), k, most), most)


def cut(reached: jax.Array, above: jax.Array, k: jax.Array | int, most: int) -> jax.Array:
    """Mask of the entries above a threshold and of its first ties, ``k`` in total.

    Args:
      reached: packed mask of the entries at or above the threshold.
      above: packed mask of the entries above it.
      k: an integer, or a uint32 scalar.
      most: static bound on ``k``.
    """
    return above | first_ones(reached ^ above, jnp.uint32(k) - count_ones(above), most)


def search(
    at_least: Callable[[jax.Array], jax.Array],
    fewest: jax.Array | int,
    most: jax.Array | int,
    size: jax.Array | int,
    low: jax.Array,
    high: jax.Array,
    kept: jax.Array | None = None,
    tried: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds a threshold that keeps between ``fewest`` and ``most`` of ``size`` entries.

    The search interpolates and bisects in turn, on the integers. It takes about twelve probes on
    smooth data, and at most twice as many as there are bits. After a first try the steps start at
    one and grow by a factor of sixteen, so that a near miss is cheap, and the first step settles a
    tie.

    Args:
      at_least: maps a threshold to the packed mask of the entries at or above it.
      fewest: the least number of entries to keep; an integer or a uint32 scalar, like the next two.
      most: the largest number of entries to keep.
      size: the number of all entries.
      low: a threshold that keeps enough entries.
      high: a threshold that keeps too few entries.
      kept: the number of entries that ``low`` keeps; by default all.
      tried: a threshold between ``low`` and ``high``, its mask, and the number that it keeps.

    Returns:
      The threshold, its mask, and the number that it keeps. This is above ``most`` only if the
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

    # The carry is computed from the bounds, so that it varies over the mesh as the entries do.
    zero = low & 0
    none = zero.astype(jnp.uint32)
    bounds = (low, high, none + jnp.uint32(size) if kept is None else kept, none)
    threshold, step = low, zero + top
    if tried is None:
        words = jnp.broadcast_to(none, jax.eval_shape(at_least, low).shape)
    else:
        threshold, words, found = tried
        bounds, step = narrowed(*bounds, threshold, found), zero + 1
    state = (*bounds, threshold, step, zero != 0, words)
    low, _, kept, _, _, _, _, words = lax.while_loop(undecided, probe, state)
    return low, words, kept
