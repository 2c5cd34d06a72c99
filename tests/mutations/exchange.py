"""Faults of the exchange: rounds, headers, weights, keys, bundles, slices, collectives."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE, CORE = "ef_optax/_exchange", "ef_optax/_core"
ROUNDS, EXCHANGE = f"{HERE}/rounds.py", f"{HERE}/exchange.py"
COLLECTIVES, TRANSFER = f"{HERE}/collectives.py", f"{HERE}/transfer.py"
WEIGHTS = "tests/parallel/test_weights_and_points.py::"
QUARANTINE = "tests/parallel/test_quarantine.py::"
MODES = "tests/parallel/test_modes.py::"
OVER_WEIGHTS = f"{WEIGHTS}test_aggregate_is_the_weighted_mean_of_what_was_sent"
MASKS = f"{MODES}test_random_masks_differ_between_steps_workers_and_leaves"

JOINED = "tests/exchange/test_sums.py::"
BUNDLES = "tests/exchange/test_bundles.py::"

MUTATIONS = (
    Mutation(
        "the messages are decoded again in every loop that reads their mean",
        f"{CORE}/transport.py",
        "return in_buffers(mean, runtime)",
        "return mean()",
        (
            "tests/exchange/test_passes.py::"
            "test_what_the_workers_sent_is_decoded_once_for_all_who_read_the_mean",
        ),
    ),
    Mutation(
        "sums between processes are not joined",
        COLLECTIVES,
        "jax.process_count() == 1 or",
        "True or",
        (f"{JOINED}test_one_collective_a_dtype_between_processes",),
    ),
    Mutation(
        "leaves of any size are taken",
        f"{HERE}/bundles.py",
        "if values <= codec.most_values:",
        "if True:",
        (f"{BUNDLES}test_a_leaf_that_is_too_large_is_refused_by_name[top_k]",),
    ),
    Mutation(
        "the leaves that are compressed together are counted one by one",
        f"{HERE}/bundles.py",
        '[members] if kind == "group" else',
        '[members] if kind == "none" else',
        (f"{BUNDLES}test_leaves_are_counted_together_only_if_they_are_compressed_together",),
    ),
    Mutation(
        "arrays that other axes split are joined",
        COLLECTIVES,
        "return by_device(axis) and set(mesh.axis_names) == set(mesh.manual_axes)",
        "return by_device(axis)",
        (f"{JOINED}test_what_other_axes_split_is_not_joined",),
    ),
    Mutation(
        "joined sums come back in another order",
        TRANSFER,
        "for i, part in zip(own, parts, strict=True):",
        "for i, part in zip(own, parts[::-1], strict=True):",
        (f"{JOINED}test_the_sums_are_those_of_the_arrays",),
    ),
    Mutation(
        "a step is good if any worker's numbers are finite",
        ROUNDS,
        "self.ok = jnp.all(head[:, 0] == 1)",
        "self.ok = jnp.any(head[:, 0] == 1)",
        (f"{QUARANTINE}test_run_equals_the_run_without_the_bad_steps[simulate]",),
    ),
    Mutation(
        "a sum of flags is good if not all workers' numbers are bad",
        ROUNDS,
        "self.ok = head == 0",
        "self.ok = head < 4",
        (
            "tests/exchange/test_header.py::"
            "test_one_bad_number_of_one_worker_is_known_to_all[a sum-nan]",
        ),
    ),
    Mutation(
        "the header travels in every round",
        ROUNDS,
        "self._carrier(kinds) if self.header_due else None",
        "self._carrier(kinds)",
        ("tests/exchange/test_header.py::test_the_header_travels_once",),
    ),
    Mutation(
        "what is summed is not weighted",
        ROUNDS,
        "            if self.weight is None:\n                return request.value",
        "            if self.weight is None or True:\n                return request.value",
        (OVER_WEIGHTS,),
    ),
    Mutation(
        "the mean over those that are present is over all",
        ROUNDS,
        'if self.normalize == "present":',
        'if self.normalize == "absent":',
        (OVER_WEIGHTS,),
    ),
    Mutation(
        "what is gathered is not weighted",
        "ef_optax/_core/codec.py",
        "return part if weights is None else part * weights[i].astype(part.dtype)",
        "return part",
        (OVER_WEIGHTS,),
    ),
    Mutation(
        "of more workers than are unrolled the first counts twice",
        "ef_optax/_core/codec.py",
        "jax.lax.fori_loop(1, n, lambda i, acc: acc + term(i), term(0))",
        "jax.lax.fori_loop(0, n, lambda i, acc: acc + term(i), term(0))",
        (f"{WEIGHTS}test_many_workers_are_averaged_in_a_loop",),
    ),
    Mutation(
        "the count of exchanges stands still, and so do random masks",
        EXCHANGE,
        "step=state.step + 1",
        "step=state.step",
        (MASKS,),
    ),
    Mutation(
        "the name of a leaf is hashed differently in every process",
        EXCHANGE,
        "np.uint32(zlib.crc32(self.paths[i].encode()))",
        "np.uint32(hash(self.paths[i]) % (1 << 32))",
        ("tests/exchange/test_keys.py",),
    ),
    Mutation(
        "a bad step is not poisoned where nothing undoes it",
        EXCHANGE,
        "aggregate = jax.tree.map(lambda x: jnp.where(rounds.ok, x, jnp.nan), aggregate)",
        "aggregate = jax.tree.map(lambda x: x, aggregate)",
        (f"{QUARANTINE}test_by_hand_it_is_loud_without_the_guard_and_skipped_with_it",),
    ),
    Mutation(
        "workers draw the same random numbers",
        f"{CORE}/workers.py",
        "if not shared:",
        "if False:",
        (MASKS,),
    ),
    Mutation(
        "a key does not know the step",
        f"{CORE}/workers.py",
        "jax.random.fold_in(jax.random.fold_in(key, self.step), stream)",
        "jax.random.fold_in(key, stream)",
        (MASKS,),
    ),
    Mutation(
        "a key does not know the leaf",
        f"{CORE}/workers.py",
        "stream = jnp.asarray(self.path, jnp.uint32) ^ own_slice",
        "stream = jnp.zeros((), jnp.uint32) ^ own_slice",
        (MASKS,),
    ),
    Mutation(
        "a key does not know the slice",
        f"{CORE}/workers.py",
        "own_slice = mix32(jnp.asarray(self.slice_index, jnp.uint32))",
        "own_slice = jnp.zeros((), jnp.uint32)",
        ("tests/parallel/test_model_axes.py::test_each_slice_sends_its_own_random_mask",),
    ),
    Mutation(
        "a schedule changes one step late",
        f"{CORE}/timeline.py",
        "jnp.sum(step >= later, dtype=jnp.int32)",
        "jnp.sum(step > later, dtype=jnp.int32)",
        ("tests/compressors/test_scheduled.py::test_timelines",),
    ),
    Mutation(
        "leaves of equal shape are stacked though their codecs differ",
        f"{HERE}/bundles.py",
        'key = ("stack", identity_of(one), x.shape, x.dtype, specs[i])',
        'key = ("stack", x.shape, x.dtype, specs[i])',
        (f"{MODES}test_every_mode_follows_the_oracle[simulate-sign]",),
    ),
    Mutation(
        "the first of a stack of leaves is handed to all of them",
        f"{HERE}/bundles.py",
        "own = rows[: len(self.members)]",
        "own = [rows[0]] * len(self.members)",
        ("tests/exchange/test_bundles.py::test_stacked_leaves_get_what_each_gets_alone[top_k]",),
    ),
    Mutation(
        "stacked leaves share one key",
        f"{HERE}/stack.py",
        "dataclasses.replace(workers, path=path)",
        "dataclasses.replace(workers, path=path * 0)",
        ("tests/exchange/test_bundles.py::test_stacked_leaves_get_what_each_gets_alone[random_k]",),
    ),
    Mutation(
        "joined leaves share one key",
        f"{HERE}/joined.py",
        "dataclasses.replace(workers, path=path)",
        "dataclasses.replace(workers, path=path * 0)",
        (f"{BUNDLES}test_joined_leaves_get_what_each_gets_alone[qsgd-linf-bucket]",),
    ),
    Mutation(
        "the mean magnitude of a leaf is that of its neighbours",
        "ef_optax/compressors/quantize/_sign_words.py",
        "start += total",
        "start += 0 * total",
        (f"{BUNDLES}test_signs_of_leaves_are_those_of_each_alone",),
    ),
    Mutation(
        "a block is decoded with the scale of another leaf",
        "ef_optax/compressors/quantize/_sign_words.py",
        "[size // block for size in self.sizes]",
        "sum(self.sizes) // block // len(self.sizes) + 1",
        (f"{BUNDLES}test_signs_of_leaves_are_those_of_each_alone",),
    ),
    Mutation(
        "a leaf that ends within a block is joined",
        f"{HERE}/joined.py",
        "return row is not None and x.size > 0 and x.size % row == 0",
        "return row is not None and x.size > row",
        (f"{BUNDLES}test_joined_leaves_get_what_each_gets_alone[block_top_k]",),
    ),
    Mutation(
        "the zeros between leaves are sent too",
        f"{HERE}/padded.py",
        "divmod(n * self.width, WORD_BITS)",
        "divmod(n * self.width + WORD_BITS, WORD_BITS)",
        (f"{BUNDLES}test_the_message_with_zeros_is_cut_to_that_of_each_leaf",),
    ),
    Mutation(
        "the last bits of a leaf are not put back",
        f"{HERE}/padded.py",
        "source[last] = len(full) + np.arange(len(last))",
        "pass",
        (f"{BUNDLES}test_the_message_with_zeros_is_cut_to_that_of_each_leaf",),
    ),
    Mutation(
        "bits of the zeros are joined with the last bits of a leaf",
        "ef_optax/_bits/fields.py",
        "_join(words & masks.astype(np.uint32), widths)",
        "_join(words, widths)",
        (f"{BUNDLES}test_the_message_with_zeros_is_cut_to_that_of_each_leaf",),
    ),
    Mutation(
        "the last block of a leaf sends as many as a full one",
        "ef_optax/compressors/sparse/block_top_k.py",
        "return length, [k] * full + [last] * bool(rest)",
        "return length, [k] * full + [k] * bool(rest)",
        (f"{BUNDLES}test_small_leaves_of_a_family_get_what_each_gets_alone[block_top_k]",),
    ),
    Mutation(
        "the mean magnitude counts the zeros of a row",
        "ef_optax/compressors/quantize/_sign_rows.py",
        "np.maximum(1, self.sizes).astype(norms.dtype)",
        "np.float32(self.length)",
        (f"{BUNDLES}test_signs_of_leaves_are_those_of_each_alone",),
    ),
    Mutation(
        "the header is read when the step ends",
        f"{CORE}/transport.py",
        "workers.step if got.ok is None else got.ok.astype(jnp.int32)",
        "workers.step",
        (f"{BUNDLES}test_messages_are_not_kept_once_their_mean_is_made",),
    ),
    Mutation(
        "leaves beyond the limit of a vector are joined",
        f"{HERE}/joined.py",
        "if end <= JOINED_LIMIT)",
        "if end)",
        ("tests/exchange/test_bundles.py::test_the_largest_leaves_stay_apart_beyond_the_limit",),
    ),
    Mutation(
        "of two worker axes the inner one counts first",
        COLLECTIVES,
        "for name in reversed(axis_names(axis)):  #",
        "for name in axis_names(axis):  #",
        ("tests/parallel/test_tiers.py", f"{WEIGHTS}test_workers_of_two_axes_are_in_order"),
    ),
    Mutation(
        "messages of a permutation go the other way",
        COLLECTIVES,
        "source[target] = start",
        "source[start] = target",
        ("tests/exchanges/test_exchanges.py::test_global_top_k_tree_against_numpy",),
    ),
    Mutation(
        "a condition that differs between workers is accepted",
        COLLECTIVES,
        '    _require_agreed("pred", pred, axis)\n',
        "",
        ("tests/parallel/test_inference.py::test_agreed_cond_refuses_a_local_predicate",),
    ),
    Mutation(
        "gradients that are already summed are compressed once more",
        COLLECTIVES,
        "if not varies(leaf, axis):",
        "if False:",
        (f"{MODES}test_gradients_that_are_already_reduced_are_refused",),
    ),
    Mutation(
        "slices of a simulated model axis are cut along the wrong axis",
        f"{HERE}/slices.py",
        "shape += [*parts, length // math.prod(parts)]",
        "shape += [length // math.prod(parts), *parts]",
        ("tests/parallel/test_model_axes.py::test_every_slice_follows_the_oracle[simulate-model]",),
    ),
    Mutation(
        "a slice does not know its number",
        f"{HERE}/slices.py",
        "indices = [coll.axis_index(a) if a else 0 for a in axes]",
        "indices = [0 for _ in axes]",
        ("tests/parallel/test_model_axes.py::test_each_slice_sends_its_own_random_mask",),
    ),
    # ---------------------------------------------------------------- traces
    Mutation(
        "objects with other settings are taken for the same",
        "ef_optax/_core/once.py",
        "return (type(value), value) if known else id(value)",
        "return type(value)",
        ("tests/exchange/test_once.py",),
    ),
    Mutation(
        "a value that one trace computes is kept for the next",
        "ef_optax/_core/once.py",
        "if _holds_tracer(owner):",
        "if False:",
        ("tests/exchange/test_once.py",),
    ),
    Mutation(
        "the method of an object is not told from its other methods",
        "ef_optax/_core/once.py",
        "(name, identity_of(owner))",
        "identity_of(owner)",
        ("tests/exchange/test_once.py",),
    ),
    Mutation(
        "the second worker is left out of the sums of simulated workers",
        COLLECTIVES,
        "jax.lax.fori_loop(1, len(rows)",
        "jax.lax.fori_loop(2, len(rows)",
        ("tests/exchange/test_sums.py",),
    ),
    Mutation(
        "simulated workers are summed by a slow reduction",
        COLLECTIVES,
        "on_cpu = not by_device(axis) and",
        "on_cpu = not by_device(axis) and False and",
        ("tests/exchange/test_sums.py",),
    ),
)
