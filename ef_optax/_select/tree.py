"""The k entries of largest magnitude among several leaves, exactly and without joining them.

The steps are those of `ef_optax._select.leaf`: a guess from a sample, a mask of the entries that
are at least as large, with one bit per entry, and an exact selection among the few kept entries.
The leaves are read one by one: the sample has a proportional part of each, each mask fills its own
words, and the kept entries are taken from each (`ef_optax._select.flat_view`). All later steps work
on the words and the kept entries of all leaves together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits.bitmask import count_ones, pack_at_least, positions
from ef_optax._bits.packing import WORD_BITS, packed_words
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._select import flat_view
from ef_optax._select import leaf as leaf_select
from ef_optax._select.search import at_least, cut, largest_of_first, search

Array = jax.Array


def plan(sizes: Sequence[int], k: int) -> leaf_select.Plan | None:
    """How the k largest entries of leaves of these sizes are searched; None if no sample helps.

    Example:
      >>> plan([1 << 20, 64], 1 << 10).sample, plan([1 << 20, 64], 1 << 20)
      (65540, None)
    """
    layout = flat_view.Layout(tuple(sizes), ())
    return leaf_select.planned(sum(sizes), k, sum(_counts(layout).values()))


def _counts(layout: flat_view.Layout) -> dict[int | None, int]:
    """The number of entries drawn from each large leaf and, under None, from all small leaves."""
    counts: dict[int | None, int] = {i: layout.sizes[i] for i in layout.large}
    counts[None] = sum(layout.sizes[i] for i in layout.small)
    return {i: size // _stretch(layout.sizes) for i, size in counts.items()}


def _stretch(sizes: Sequence[int]) -> int:
    """The number of entries of which one is drawn."""
    size = sum(sizes)
    return size // max(1, min(leaf_select.SAMPLE, size // 16)) or 1


def top_k(
    xs: Sequence[Array], k: int, rows: Sequence[Array | int], dtype: Any
) -> tuple[Array, Array]:
    """Indices and entries of the ``k`` largest magnitudes; ties go to the earlier leaf and index.

    Args:
      xs: floating leaves of any shapes, which have a `plan`.
      k: static number of entries.
      rows: the numbers 0 ... number of leaves, as data.
      dtype: the dtype in which the entries are compared.

    Returns:
      Ascending indices into the vector of all leaves, uint32 of shape (k,), and the entries.
    """
    flats = [x.reshape(-1) for x in xs]
    aligned = flat_view.Layout(tuple(x.size for x in xs), rows, WORD_BITS)
    found = plan(aligned.sizes, k)
    assert found is not None
    sample, low_rank, high_rank, capacity = found
    drawn = magnitude_order(_drawn(flats, aligned, dtype))
    everything = _at_least(flats, aligned, dtype)

    low, high = jnp.min(drawn), jnp.max(drawn) + 1
    guess, _, _ = search(at_least(drawn), low_rank, high_rank, sample, low, high)
    zero, top = guess & 0, jnp.asarray(jnp.iinfo(guess.dtype).max)
    words = everything(guess)
    count = count_ones(words)

    def search_on() -> Array:
        threshold, found, kept = search(
            everything,
            k,
            capacity,
            sum(aligned.sizes),
            zero,
            zero + top,
            tried=(guess, words, count),
        )

        def tied() -> Array:
            return cut(everything(threshold), everything(threshold + 1), k, k)

        # More entries than fit are kept only if that many are equal; these are cut by index.
        return lax.cond(kept > capacity, tied, lambda: found)

    words = lax.cond((count >= k) & (count <= capacity), lambda: words, search_on)
    count = count_ones(words)
    real = jnp.arange(capacity, dtype=jnp.uint32) < count
    kept = jnp.where(real, positions(words, capacity), np.uint32(aligned.ends[-1]))
    entries = flat_view.take(xs, aligned, kept, dtype)
    order = magnitude_order(entries)
    chosen = largest_of_first(order, count, k)
    kept = kept.at[chosen].get(mode="promise_in_bounds")
    return _close_up(kept, aligned), entries.at[chosen].get(mode="promise_in_bounds")


def _at_least(
    flats: Sequence[Array], aligned: flat_view.Layout, dtype: Any
) -> Callable[[Array], Array]:
    """The packed masks of all leaves, each in its own words, as a function of the threshold."""
    if not aligned.small:
        return lambda threshold: jnp.concatenate([_mask(x, threshold, dtype) for x in flats])
    small, real = aligned.joined(flats, dtype), _real_bits(aligned)
    begins = aligned.begins

    def masks(threshold: Array) -> Array:
        joined = _mask(small, threshold, dtype) & real
        parts = []
        for i, x in enumerate(flats):
            if i in begins:
                first = begins[i] // WORD_BITS
                parts.append(joined[first : first + packed_words(x.size, 1)])
            elif x.size:
                parts.append(_mask(x, threshold, dtype))
        return jnp.concatenate(parts)

    return masks


def _real_bits(aligned: flat_view.Layout) -> Array:
    """The mask of the bits that are not padding among the small leaves."""
    ends = [begin + aligned.sizes[i] for i, begin in aligned.begins.items()]
    ragged = [end for end in ends if end % WORD_BITS]
    partial = np.asarray([end // WORD_BITS for end in ragged], np.int32)
    bits = np.asarray([(1 << end % WORD_BITS) - 1 for end in ragged], np.uint32)
    words = jnp.full(packed_words(ends[-1], 1), np.uint32((1 << 32) - 1))
    return words.at[partial].set(bits)


@functools.partial(jax.jit, static_argnames="dtype")
def _mask(x: Array, threshold: Array, dtype: Any) -> Array:
    x, threshold = lax.optimization_barrier((x, threshold))
    return pack_at_least(magnitude_order(x.astype(dtype)), threshold)


def _drawn(flats: Sequence[Array], aligned: flat_view.Layout, dtype: Any) -> Array:
    """A sample with one entry of each stretch; small leaves are drawn from together."""
    parts = []
    for i, count in _counts(aligned).items():
        if i is not None and count:
            parts.append(leaf_select.draw(flats[i], count).astype(dtype))
        elif count:
            sizes = [aligned.sizes[j] for j in aligned.small]
            drawn = leaf_select.drawn_positions(sum(sizes), count)
            ends = np.cumsum(sizes, dtype=np.uint32)
            begins = np.asarray(list(aligned.begins.values()), np.uint32)
            gaps = jnp.asarray(begins - (ends - np.asarray(sizes, np.uint32)))
            drawn += gaps[jnp.searchsorted(ends, drawn, side="right", method="scan_unrolled")]
            joined = aligned.joined(flats, dtype)
            parts.append(joined.at[drawn].get(mode="promise_in_bounds"))
    return jnp.concatenate(parts)


def _close_up(indices: Array, aligned: flat_view.Layout) -> Array:
    """Turns sorted indices into leaves that begin at full words into indices without gaps."""
    dense = flat_view.Layout(aligned.sizes, aligned.rows)
    gaps = np.asarray(aligned.ends[:-1], np.uint32) - np.asarray(dense.ends[:-1], np.uint32)
    leaf = aligned.leaf_of(aligned.bounds(indices), indices.size)
    return indices - jnp.asarray(gaps)[leaf]
