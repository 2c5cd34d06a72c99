"""Faults of the lift, of gradients, of changes of workers, and of what is saved of a run."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/parallel"
CHECKPOINT, FLAT = "ef_optax/checkpoint.py", "ef_optax/flat.py"
TESTS = "tests/parallel"
CHANGE = f"{TESTS}/test_change_workers.py::"
QUARANTINE = f"{TESTS}/test_quarantine.py::"
INFERENCE = f"{TESTS}/test_inference.py::"
POINTS = f"{TESTS}/test_weights_and_points.py::"
SAVED = "tests/test_checkpoint.py::"
OF_FLAT = "tests/test_flat.py::"

MUTATIONS = (
    # ---------------------------------------------------------------- change of workers
    Mutation(
        "the mean of what is owed shrinks with the number of workers",
        f"{HERE}/change_workers.py",
        "return new * np.clip(high - low, 0.0, None)",
        "return old * np.clip(high - low, 0.0, None)",
        (f"{CHANGE}test_mean_is_kept_and_the_run_goes_on",),
    ),
    Mutation(
        "the shards of a server are mixed like residuals",
        f"{HERE}/change_workers.py",
        "if role == SHARDS:",
        "if role == SHARDS and old.ndim > 2:",
        ("tests/feedback/test_ef14_kin.py::test_two_shot_shards_are_cut_anew_for_other_workers",),
    ),
    Mutation(
        "the state stays on the devices of the old mesh",
        f"{HERE}/change_workers.py",
        'return jax.device_put(value, like.sharding) if hasattr(like, "sharding") else value',
        "return value",
        (f"{CHANGE}test_state_moves_to_the_devices_of_the_new_mesh",),
    ),
    # ---------------------------------------------------------------- replicas
    Mutation(
        "copies on other devices of the process are not looked at",
        f"{HERE}/replicas.py",
        "min(sums, default=-1), max(sums, default=-1)",
        "min(sums, default=-1), min(sums, default=-1)",
        (f"{TESTS}/test_replicas.py::test_one_bit_in_one_copy_is_named",),
    ),
    Mutation(
        "a bit that flips on the disk is restored",
        CHECKPOINT,
        "if replicas.checksum(part) != expected:",
        "if replicas.checksum(part) < 0:",
        (f"{SAVED}test_a_damaged_checkpoint_is_refused_in_one_line",),
    ),
    Mutation(
        "what orbax cannot decode ends in its own page of text",
        CHECKPOINT,
        "or not (known or type(error) is Exception):",
        "or not known:",
        (f"{SAVED}test_a_damaged_checkpoint_is_refused_in_one_line",),
    ),
    Mutation(
        "only the first worker's part has a checksum",
        CHECKPOINT,
        "for part in replicas.parts_of(list(arrays.values()))",
        "for part in replicas.parts_of(list(arrays.values())) if not any(part.begin)",
        (f"{SAVED}test_the_part_of_every_worker_has_a_checksum",),
    ),
    # ---------------------------------------------------------------- overlapped
    Mutation(
        "the updates of this step are applied in this step",
        f"{HERE}/overlapped.py",
        "return before\n",
        "return after[0]\n",
        (f"{TESTS}/test_overlapped.py::test_the_update_of_the_step_before_is_applied",),
    ),
    Mutation(
        "the update does not know the mesh of the thread that calls",
        f"{HERE}/overlapped.py",
        "if mesh.empty:",
        "if True:",
        (
            f"{TESTS}/test_overlapped.py::test_another_thread_starts_every_update_and_knows_the_mesh",
        ),
    ),
    # ---------------------------------------------------------------- quarantine
    Mutation(
        "the state of a bad step is kept",
        f"{HERE}/quarantine.py",
        "jax.lax.select(ok, b, a) if equal else",
        "b if equal else",
        (f"{QUARANTINE}test_run_equals_the_run_without_the_bad_steps[simulate]",),
    ),
    Mutation(
        "updates that overflow in the mean are applied",
        f"{HERE}/quarantine.py",
        "    flags.append(all_finite(jax.tree.leaves(updates), local=local))\n",
        "",
        (f"{QUARANTINE}test_numbers_that_may_overflow_or_do_are_skipped_too",),
    ),
    Mutation(
        "gradients of any finite size are accepted",
        f"{HERE}/quarantine.py",
        "local=local, squares=True)",
        "local=local)",
        (f"{QUARANTINE}test_arguments_of_one_worker_are_watched_as_its_gradient_is",),
    ),
    Mutation(
        "arguments of one worker are not watched",
        f"{HERE}/lift.py",
        "watched(plan.lift, g, *others, axis=axis)",
        "watched(plan.lift, g, axis=axis)",
        (f"{QUARANTINE}test_arguments_of_one_worker_are_watched_as_its_gradient_is",),
    ),
    Mutation(
        "a bad step is not counted",
        f"{HERE}/quarantine.py",
        "skipped=a.skipped + jnp.where(ok, 0, 1).astype(jnp.int32)",
        "skipped=a.skipped",
        (f"{QUARANTINE}test_run_equals_the_run_without_the_bad_steps[simulate]",),
    ),
    Mutation(
        "tiers decide each for itself whether a step is good",
        f"{HERE}/quarantine.py",
        "ok = coll.psum(jnp.where(ok, 0, 1).astype(jnp.int32), axis) == 0",
        "ok = ok",
        (f"{TESTS}/test_tiers.py",),
    ),
    Mutation(
        "the lift does not skip bad steps",
        f"{HERE}/lift.py",
        "return keep_if_bad(emitted, after, state, axis, accepted=lift.accepted, local=unsplit)",
        "return emitted, after",
        (f"{QUARANTINE}test_run_equals_the_run_without_the_bad_steps[simulate]",),
    ),
    # ---------------------------------------------------------------- inference
    Mutation(
        "what varies after one step is not fed back",
        f"{HERE}/inference.py",
        "if merged == own:",
        "if merged is not None:",
        (f"{INFERENCE}test_exactly_the_leaves_that_differ_are_found",),
    ),
    Mutation(
        "updates that differ between workers are let through",
        f"{HERE}/inference.py",
        "        if differs:\n",
        "        if False:\n",
        (f"{INFERENCE}test_updates_that_differ_are_refused_by_name",),
    ),
    Mutation(
        "parameters split over the worker axis are accepted",
        f"{HERE}/specs.py",
        "if axis in axis_names(axis_name):",
        "if False:",
        (f"{TESTS}/test_hostile.py::test_parameters_split_over_the_worker_axis_are_refused",),
    ),
    Mutation(
        "the state of a split parameter lies whole on every device",
        f"{HERE}/mesh.py",
        "return P(self.axis_name, *spec) if layout.axes else spec",
        "return P(self.axis_name) if layout.axes else spec",
        (f"{TESTS}/test_model_axes.py::test_the_state_is_split_as_its_parameter",),
    ),
    Mutation(
        "codecs are traced again at the first update on a mesh",
        f"{HERE}/mesh.py",
        "if self._model_axes:  # they are emulated",
        "if True:  # they are emulated",
        (f"{TESTS}/test_tracings.py::test_codecs_are_not_traced_again_at_the_first_update",),
    ),
    Mutation(
        "every leaf is converted to automatic axes on an Explicit mesh",
        f"{HERE}/mesh.py",
        "return not self._model_axes and all(",
        "return False and all(",
        (f"{TESTS}/test_first_step.py::test_explicit_axes_add_no_equation",),
    ),
    Mutation(
        "whether types vary is asked for each leaf",
        "ef_optax/_exchange/collectives.py",
        "needed = any(missing(x) for x in jax.tree.leaves(tree)) and typed(axis)",
        "needed = any([missing(x) and typed(axis) for x in jax.tree.leaves(tree)])",
        (f"{TESTS}/test_first_step.py::test_one_more_leaf_adds_few_equations",),
    ),
    # ---------------------------------------------------------------- gradients
    Mutation(
        "all workers drop the same units",
        f"{HERE}/gradients.py",
        "arrays = _fold_keys(arrays, coll.axis_index(axis_name))",
        "arrays = list(arrays)",
        (f"{POINTS}test_aux_and_keys",),
    ),
    Mutation(
        "accumulated gradients are summed, not averaged",
        f"{HERE}/gradients.py",
        "loss, grads = jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)",
        "loss, grads = total",
        (f"{POINTS}test_accumulation_equals_the_whole_share",),
    ),
    Mutation(
        "micro-batches drop the same units",
        f"{HERE}/gradients.py",
        "at_points(points, part[1], _fold_keys(arrays, part[0]))",
        "at_points(points, part[1], arrays)",
        (f"{POINTS}test_aux_and_keys",),
    ),
    Mutation(
        "a Hessian is taken along the point, not along the step",
        f"{HERE}/gradients.py",
        "jax.jvp(gradient_at, (point.point,), (point.tangent,))[1]",
        "jax.jvp(gradient_at, (point.point,), (point.point,))[1]",
        (f"{POINTS}test_points_are_evaluated_on_the_same_batch",),
    ),
    Mutation(
        "a loss that compares types is only traced on the mesh",
        f"{HERE}/mesh_types.py",
        "return _without_types(fun, operands)",
        "return fun(*operands)",
        (f"{TESTS}/test_modules.py::test_a_constant_and_an_argument_have_equal_types",),
    ),
    # ---------------------------------------------------------------- checkpoints
    Mutation(
        "a checkpoint of another model is read",
        CHECKPOINT,
        "if a is not None and b is not None and a[0] == b[0]:",
        "if a is not None and b is not None:",
        (f"{SAVED}test_a_foreign_checkpoint_is_refused",),
    ),
    Mutation(
        "a checkpoint of another version is read",
        CHECKPOINT,
        'if about["version"] != VERSION:',
        'if about["version"] < 0:',
        (f"{SAVED}test_another_version_is_refused",),
    ),
    Mutation(
        "with other workers the state is that of a fresh start",
        CHECKPOINT,
        'tree["opt_state"] = change_workers(tree["opt_state"], fresh)',
        'tree["opt_state"] = fresh',
        (f"{SAVED}test_another_number_of_workers_keeps_the_mean_residual",),
    ),
    Mutation(
        "a checkpoint is overwritten",
        CHECKPOINT,
        "if target.exists():",
        "if False:",
        (f"{SAVED}test_nothing_is_overwritten_and_nothing_half_done_is_read",),
    ),
    # ---------------------------------------------------------------- one flat buffer
    Mutation(
        "equal leaves of the flat buffer are all cut out at the place of the first",
        "ef_optax/_numeric/offsets.py",
        "zip(shared, as_data([ends[i] for i in shared], runtime), strict=True)",
        "zip(shared, as_data([ends[shared[0]] for i in shared], runtime), strict=True)",
        (f"{OF_FLAT}test_it_is_the_flattening_of_optax[scaled_sign-devices]",),
    ),
    Mutation(
        "leaves of several dtypes are joined in that of the first",
        FLAT,
        "dtype = jnp.result_type(*(leaf for _, leaf in located))",
        "dtype = jnp.result_type(located[0][1])",
        (f"{OF_FLAT}test_leaves_of_several_dtypes_and_none_at_all",),
    ),
    Mutation(
        "a leaf of integers is joined with the others",
        FLAT,
        "if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):",
        "if False:",
        (f"{OF_FLAT}test_a_leaf_of_integers_is_refused_by_name",),
    ),
    Mutation(
        "gradients at all query points are accepted by one norm",
        f"{HERE}/quarantine.py",
        'if name == "grads" and isinstance(value, Mapping)',
        "if False",
        ("tests/feedback/test_bad_gradients.py::test_no_bad_number_is_remembered",),
    ),
)
