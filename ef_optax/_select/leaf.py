"""The k entries of largest magnitude, exactly, without sorting.

Ties go to the lowest index, so the selected set is that of a stable sort by falling magnitude (see
`ef_optax._select.search` for how magnitudes are compared).

A large leaf is read in order a few times, and never sorted. The same search for a threshold runs
three times: on a small sample, for a guess of the k-th magnitude; on all entries, where the first
probe usually keeps k entries and a few more; and on the kept entries, for the exact k-th magnitude.
A probe writes one bit per entry, and rank and select find the kept entries from these words.

Several large leaves share all programs except those that read a leaf: the draw of its sample, its
mask, and the gather of its kept entries. These are small, and equal for leaves of equal size. The
others work on the samples, the words and the kept entries, one leaf after the other in a loop, so
that they are compiled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits.bitmask import count_ones, positions
from ef_optax._bits.packing import packed_words
from ef_optax._numeric import offsets
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._select.search import at_least, cut, largest_of_first, search

# Below this size one call of the backend's partial sort is as fast, and it compiles faster.
SORT_SIZE = 1 << 16
# The most entries that are sampled for the first guess.
SAMPLE = 1 << 17
# The distance of the guess from a miss on either side, in standard deviations of a sampled rank. A
# miss costs another pass over the leaf, but never a wrong result.
_MARGIN = 3.0


def top_k_indices(x: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` largest magnitudes, ascending; ties go to the lowest index.

    Args:
      x: floating array of shape (d,).
      k: static number of entries, ``0 <= k <= d``.

    Returns:
      int32 of shape (k,).

    Raises:
      ValueError: if ``k`` is not in ``0 ... d``, ``x`` is not one-dimensional, or has more entries
        than int32 can number.

    Example:
      >>> top_k_indices(jnp.array([1.0, -3.0, 2.0, 3.0]), 2).tolist()
      [1, 3]
    """
    return top_k(x, k)[0]


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The indices of `top_k_indices`, and the entries there.

    Example:
      >>> [part.tolist() for part in top_k(jnp.array([1.0, -3.0, 2.0, 3.0]), 2)]
      [[1, 3], [-3.0, 3.0]]
    """
    if x.ndim != 1:
        raise ValueError(f"x must be one-dimensional, got shape {x.shape}: flatten it first")
    if not 0 <= k <= x.size:
        raise ValueError(f"k must be between 0 and the size {x.size}, got {k}")
    if x.size >= 1 << 31:  # JAX would number them in 64 bits, which it has only under x64
        raise ValueError(f"the positions of {x.size} values do not fit in int32; split the array")
    if plan(x.size, k) is not None:
        indices, values = top_k_of_each([x], [k], [0])
        return indices[0], values[0]
    indices = _few(x, k).astype(jnp.int32)
    return indices, x[indices]


def _few(x: jax.Array, k: int) -> jax.Array:
    """The indices if a sample does not help: for small leaves, or if most entries are kept."""
    if k == 0 or k == x.size:
        return jnp.arange(k, dtype=jnp.uint32)
    if k == 1 and x.size <= SORT_SIZE:  # one pass, which is fast even if 64-bit sorts are slow
        return jnp.argmax(magnitude_order(x))[None]
    if x.size <= SORT_SIZE:
        return jnp.sort(lax.top_k(_as_normal_floats(magnitude_order(x)), k)[1])
    zero = magnitude_order(x[0]) & 0
    threshold, _, _ = search(at_least(x), k, k, x.size, zero, zero + jnp.iinfo(zero.dtype).max)
    return positions(cut(at_least(x)(threshold), at_least(x)(threshold + 1), k, k), k)


def top_k_of_rows(rows: jax.Array, ks: Sequence[int]) -> jax.Array:
    """Indices of the largest magnitudes of each row, by the backend's partial sort.

    Args:
      rows: floating array of shape (m, length). A row may end in zeros that are no entries; they
        are not chosen, because of equal magnitudes the first are.
      ks: static number of entries of each row.

    Returns:
      uint32 of shape (sum of ks,): the indices of each row, ascending, row after row.

    Example:
      >>> top_k_of_rows(jnp.array([[1.0, -3.0, 2.0], [0.0, 5.0, 0.0]]), [2, 1]).tolist()
      [1, 2, 1]
    """
    most = max(ks)
    found = lax.top_k(_as_normal_floats(magnitude_order(rows)), most)[1]
    wanted = np.arange(most) < np.asarray(ks)[:, None]
    found = lax.sort(jnp.where(wanted, found, np.int32(rows.shape[1])), dimension=1)
    own = np.flatnonzero(wanted)
    return found.reshape(-1).at[own].get(mode="promise_in_bounds").astype(jnp.uint32)


def _as_normal_floats(order: jax.Array) -> jax.Array:
    """Maps non-negative integers to floats in the same order, none of them denormal or NaN.

    Backends have a fast partial sort only for float32.
    """
    if order.dtype.itemsize < 4:
        return order.astype(jnp.float32)
    if order.dtype.itemsize > 4:
        return order
    half, least = np.int32(1 << 30), np.int32(1 << 23)
    above = order - half + least
    below = (half - 1 - order + least) | np.int32(-(1 << 31))
    return lax.bitcast_convert_type(jnp.where(order >= half, above, below), jnp.float32)


# ---------------------------------------------------------------------------- large leaves


class Plan(NamedTuple):
    """How the k largest entries of a large leaf are searched."""

    sample: int  # number of entries drawn for the guess
    low: int  # ranks in the sample between which the guess must be
    high: int
    capacity: int  # the most entries that the guess may keep


def plan(size: int, k: int) -> Plan | None:
    """The plan for a leaf; None if a sample does not help.

    Only leaves with samples of the same size can go through `top_k_of_each` together, so the sizes
    of samples are powers of two.

    Example:
      >>> plan(1 << 20, 1 << 10).sample, plan(100, 10), plan(1 << 20, 1 << 20)
      (65536, None, None)
    """
    if size <= SORT_SIZE:
        return None
    return planned(size, k, min(SAMPLE, 1 << (size // 16).bit_length() - 1))


def planned(size: int, k: int, sample: int) -> Plan | None:
    """The plan for a sample of this size; None if it does not help."""
    if not 0 < k < size or not sample:
        return None
    rank = k * sample / size
    low = math.ceil(rank + _MARGIN * (math.sqrt(rank) + 1))
    high = math.ceil(low + math.sqrt(low) / 2)
    kept = (high + _MARGIN * (math.sqrt(high) + 1)) * size / sample
    capacity = min(math.ceil(kept), size)
    if 2 * capacity > size:
        return None
    return Plan(sample, min(low, sample), min(high, sample), capacity)


class _Numbers(NamedTuple):
    """The numbers that differ between leaves: of one leaf, or arrays with an entry per leaf."""

    size: Any
    k: Any
    low: Any
    high: Any
    capacity: Any


def top_k_of_each(
    xs: Sequence[jax.Array], ks: Sequence[int], rows: Sequence[jax.Array | int]
) -> tuple[jax.Array, jax.Array]:
    """Indices and entries of the ``k`` largest magnitudes of each of several large leaves.

    Args:
      xs: m floating arrays of one dtype, of shapes (d_i,), whose plans have samples of one size.
      ks: static number of entries of each leaf.
      rows: the numbers 0 ... m - 1; as data (`ef_optax._numeric.offsets.as_data`) if programs are
        to be shared.

    Returns:
      Indices, int32 of shape (m, max k), and entries. Each row has those of `top_k` first, and then
      zeros.
    """
    plans = [plan(x.size, k) for x, k in zip(xs, ks, strict=True)]
    found = [p for p in plans if p is not None]
    [sample] = {p.sample for p in found}
    most, capacity = max(ks), max(p.capacity for p in found)
    columns = ([x.size for x in xs], ks, *zip(*(p[1:] for p in found), strict=True))
    numbers = _Numbers(*(np.asarray(column, np.uint32) for column in columns))
    words_each = max(packed_words(x.size, 1) for x in xs)

    def row(array: jax.Array, i: int) -> jax.Array:
        return offsets.row(array, rows[i])

    def mask_of(x: jax.Array) -> Callable[[jax.Array], jax.Array]:
        spare = words_each - packed_words(x.size, 1)
        return lambda threshold: jnp.pad(at_least(x)(threshold), (0, spare))

    def guess(drawn: jax.Array, number: _Numbers) -> jax.Array:
        order = magnitude_order(drawn)
        low, high = jnp.min(order), jnp.max(order) + 1
        return search(at_least(order), number.low, number.high, sample, low, high)[0]

    def search_on() -> jax.Array:
        def one(
            i: jax.Array, tried: jax.Array, words: jax.Array, count: jax.Array, number: _Numbers
        ) -> jax.Array:
            def mask(threshold: jax.Array) -> jax.Array:
                return masks[0](threshold) if len(xs) == 1 else lax.switch(i, masks, threshold)

            zero, top = tried & 0, jnp.asarray(jnp.iinfo(tried.dtype).max)
            threshold, found, kept = search(
                mask,
                number.k,
                number.capacity,
                number.size,
                zero,
                zero + top,
                tried=(tried, words, count),
            )

            def tied() -> jax.Array:
                pair = threshold, threshold + 1
                if len(xs) > 1:  # the program then has the switch over the leaves only once
                    reached, above = lax.map(mask, jnp.stack(pair))
                else:
                    reached, above = map(mask, pair)
                return cut(reached, above, number.k, most)

            # More entries than fit are kept only if that many are equal; these are cut by index.
            return lax.cond(kept > number.capacity, tied, lambda: found)

        return _each(one, jnp.arange(len(xs)), guesses, words, counts, numbers)

    def finish(
        kept: jax.Array, entries: jax.Array, words: jax.Array, number: _Numbers
    ) -> tuple[jax.Array, jax.Array]:
        order = magnitude_order(entries)
        chosen = largest_of_first(order, count_ones(words), number.k, most)
        return kept[chosen], entries[chosen]

    masks = [mask_of(x) for x in xs]
    guesses = _each(guess, jnp.stack([draw(x, sample) for x in xs]), numbers)
    words = jnp.stack([mask(row(guesses, i)) for i, mask in enumerate(masks)])
    counts = _each(count_ones, words)
    # The loop over leaves is inside a condition. The caller may want to update a leaf in place, and
    # an unconditional loop would make the compiler copy it first.
    fits = jnp.all((counts >= numbers.k) & (counts <= numbers.capacity))
    words = lax.cond(fits, lambda: words, search_on)
    kept = _each(lambda words: positions(words, capacity), words)
    entries = jnp.stack([_get(x, row(kept, i)) for i, x in enumerate(xs)])
    indices, values = _each(finish, kept, entries, words, numbers)
    real = jnp.arange(most) < jnp.asarray(ks)[:, None]
    indices = indices.astype(jnp.int32)
    return jnp.where(real, indices, 0), jnp.where(real, values, 0)


def _each(function: Callable[..., Any], *arrays: Any) -> Any:
    """Applies a function to one row after the other; to a single row without a loop."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return lax.map(lambda row: function(*row), arrays)
    result = function(*jax.tree.map(lambda x: x[0], arrays))
    return jax.tree.map(lambda x: x[None], result)


def _get(x: jax.Array, indices: jax.Array) -> jax.Array:
    return x.at[indices].get(mode="promise_in_bounds")


def draw(x: jax.Array, count: int) -> jax.Array:
    """The entries of a vector at `drawn_positions`."""
    return _get(x, drawn_positions(x.size, count))


def drawn_positions(size: int, count: int) -> jax.Array:
    """A position in each of ``count`` equal stretches, scrambled in case the data are periodic."""
    stride = size // count
    index = jnp.arange(count, dtype=jnp.uint32)
    shift = ((index * np.uint32(2654435769)) >> np.uint32(16)) % np.uint32(stride)
    return index * np.uint32(stride) + shift
