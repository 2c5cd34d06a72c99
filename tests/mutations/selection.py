"""Faults of the selection of the largest entries: of a leaf, of each block, of several leaves."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/_select"
LEAF, BLOCKS, SEARCH = (f"{HERE}/{name}.py" for name in ("leaf", "blocks", "search"))
TREE, VIEW, WHOLE = (f"{HERE}/{name}.py" for name in ("tree", "flat_view", "whole"))
OF_LEAF = "tests/select/test_selection.py::"
OF_WHOLE = "tests/select/test_whole.py::"
ON_ADVERSARIES = (f"{OF_LEAF}test_same_set_as_a_stable_sort_on_adversaries[5000]",)
OF_ROWS = (
    "tests/exchange/test_bundles.py::test_small_leaves_of_a_family_get_what_each_gets_alone",
)
SAME_SET = f"{OF_WHOLE}test_same_set_as_a_stable_sort_of_the_concatenation"

MUTATIONS = (
    Mutation(
        "all ties of the last entry are kept",
        SEARCH,
        "return above | first_ones(reached ^ above, jnp.uint32(k) - count_ones(above), most)",
        "return reached",
        ON_ADVERSARIES,
    ),
    Mutation(
        "entries past the end of a list are candidates",
        SEARCH,
        "order = jnp.where(real, order, jnp.asarray(-1, order.dtype))",
        "order = order",
        ON_ADVERSARIES,
    ),
    Mutation(
        "a guess that keeps too few is believed",
        LEAF,
        "fits = jnp.all((counts >= numbers.k) & (counts <= numbers.capacity))",
        "fits = jnp.all(counts <= numbers.capacity)",
        (f"{OF_LEAF}test_a_bad_guess_costs_passes_not_the_result",),
    ),
    Mutation(
        "a guess that keeps more than there is room for is believed",
        LEAF,
        "fits = jnp.all((counts >= numbers.k) & (counts <= numbers.capacity))",
        "fits = jnp.all(counts >= numbers.k)",
        (f"{OF_LEAF}test_a_bad_guess_costs_passes_not_the_result",),
    ),
    Mutation(
        "more ties than there is room for are not cut by index",
        LEAF,
        "return lax.cond(kept > number.capacity, tied, lambda: found)",
        "return found",
        ON_ADVERSARIES,
    ),
    Mutation(
        "of a row with fewer entries than another, entries behind its last are sent",
        LEAF,
        "found = lax.sort(jnp.where(wanted, found, np.int32(rows.shape[1])), dimension=1)",
        "found = lax.sort(found, dimension=1)",
        OF_ROWS,
    ),
    Mutation(
        "zeros that fill a row count as entries",
        LEAF,
        "found = lax.top_k(_as_normal_floats(magnitude_order(rows)), most)[1]",
        "found = rows.shape[1] - 1 - lax.top_k(\n"
        "        _as_normal_floats(magnitude_order(rows[:, ::-1])), most\n"
        "    )[1]",
        OF_ROWS,
    ),
    Mutation(
        "a block with more entries than there is room for is not searched again",
        BLOCKS,
        "words = lax.cond(jnp.all(counts <= capacity), lambda: words, search_on)",
        "words = lax.cond(jnp.all(counts >= 0), lambda: words, search_on)",
        (f"{OF_LEAF}test_each_block_gets_the_set_of_a_stable_sort[1024-10]",),
    ),
    Mutation(
        "padding between small leaves counts as entries of zero",
        TREE,
        "joined = _mask(small, threshold, dtype) & real",
        "joined = _mask(small, threshold, dtype)",
        (f"{SAME_SET}[many-in place]", f"{SAME_SET}[all small-in place]"),
    ),
    Mutation(
        "indices of the whole count the gaps between aligned leaves",
        TREE,
        "return indices - jnp.asarray(gaps)[leaf]",
        "return indices",
        (f"{SAME_SET}[many-in place]",),
    ),
    Mutation(
        "a guess for all leaves that is too high is believed",
        TREE,
        "words = lax.cond((count >= k) & (count <= capacity), lambda: words, search_on)",
        "words = lax.cond(count <= capacity, lambda: words, search_on)",
        (f"{OF_WHOLE}test_a_sample_of_the_largest_entries_alone_does_not_mislead",),
    ),
    Mutation(
        "entries of a leaf are read from the beginning of the vector",
        VIEW,
        "own = lax.dynamic_slice(indices, (slot,), (WINDOW,)) - start",
        "own = lax.dynamic_slice(indices, (slot,), (WINDOW,))",
        (f"{SAME_SET}[many-in place]",),
    ),
    Mutation(
        "slots behind the last are added to the first entry",
        VIEW,
        "jnp.pad(indices, ((0, 0), (0, WINDOW)), constant_values=nowhere)",
        "jnp.pad(indices, ((0, 0), (0, WINDOW)), constant_values=0)",
        (f"{OF_WHOLE}test_entries_to_which_nothing_is_added_keep_their_bits",),
    ),
    Mutation(
        "what the last worker adds to a large leaf is left out",
        VIEW,
        "return lax.fori_loop(0, len(indices), of_row, x)",
        "return lax.fori_loop(0, len(indices) - 1, of_row, x)",
        (f"{OF_WHOLE}test_sums_at_entries[many-3]",),
    ),
    Mutation(
        "only the first window of a leaf is visited",
        VIEW,
        "return lax.while_loop(lambda state: state[0] < last, visit, (first, carry))[1]",
        "return visit((first, carry))[1]",
        (f"{SAME_SET}[many-in place]",),
    ),
    Mutation(
        "what lies behind the last whole block counts as a block",
        BLOCKS,
        "return x[: x.size // length * length].reshape(-1, length)",
        "return jnp.pad(x, (0, -x.size % length)).reshape(-1, length)",
        (f"{OF_LEAF}test_each_block_gets_the_set_of_a_stable_sort[300-3]",),
    ),
)
