"""Faults of the feedback rules, the estimators, the local steps and what they are made of."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

FEEDBACK, MADE_OF = "ef_optax/feedback", "ef_optax/_rules"
LOCAL, ESTIMATORS = "ef_optax/local", "ef_optax/estimators"
TESTS = "tests/feedback"
EF14 = f"{TESTS}/test_ef14.py"
KIN = f"{TESTS}/test_ef14_kin.py"
EF21 = f"{TESTS}/test_ef21.py"
DIFFERENCES = f"{TESTS}/test_differences.py"
BAD = f"{TESTS}/test_bad_gradients.py"
VARIANCE = f"{TESTS}/test_variance_based.py"
STORED = f"{TESTS}/test_stored.py"

STEPS = "tests/local/test_local_steps.py"
RECIPES = "tests/recipes/test_recipes.py"

MUTATIONS = (
    # ---------------------------------------------------------------- error feedback
    Mutation(
        "the ratio of the learning rates stands on its head",
        f"{FEEDBACK}/ef14.py",
        "ratio = last / jnp.where(active, rate, 1)",
        "ratio = jnp.where(active, rate, 1) / jnp.where(last == 0, 1, last)",
        (f"{EF14}::test_reference_iterates",),
    ),
    Mutation(
        "a rate of zero is remembered as the last one",
        f"{FEEDBACK}/ef14.py",
        "last = jnp.where(active, rate, last)",
        "last = rate",
        (f"{EF14}::test_nothing_is_applied_and_all_is_kept_where_the_rate_is_zero",),
    ),
    Mutation(
        "the part of the residual that is not injected is lost",
        f"{FEEDBACK}/ef14.py",
        "r + (1.0 - injection) * x.astype(r.dtype)",
        "r",
        (f"{EF14}::test_reference_iterates",),
    ),
    Mutation(
        "the sum of gradient and residual is taken in the gradient's dtype",
        f"{FEEDBACK}/ef14.py",
        "return g.astype(wide) + e.astype(wide)",
        "return (g + e.astype(g.dtype)).astype(wide)",
        ("tests/feedback/test_conservation.py::test_sent_plus_residual_is_what_came_in[top_k]",),
    ),
    Mutation(
        "at a rate of zero the residual is that of a step that was not applied",
        f"{FEEDBACK}/ef14.py",
        "kept = jax.tree.map(lambda r, x: jnp.where(active, r, x), kept, state.residual)",
        "kept = jax.tree.map(lambda r, x: r, kept, state.residual)",
        (f"{EF14}::test_nothing_is_applied_and_all_is_kept_where_the_rate_is_zero",),
    ),
    # ---------------------------------------------------------------- its relatives
    Mutation(
        "damping: the residual forgets what was held back",
        f"{FEEDBACK}/ef_momentum.py",
        "r = trees.axpy(beta, r, out.residual)",
        "r = out.residual",
        (f"{KIN}::test_ef_momentum",),
    ),
    Mutation(
        "ECQ-SGD: the injected error is counted twice",
        f"{FEEDBACK}/ecq_sgd.py",
        "trees.axpy(beta - alpha, h, out.residual)",
        "trees.axpy(beta, h, out.residual)",
        (f"{KIN}::test_ecq_sgd",),
    ),
    Mutation(
        "DGC: Nesterov's velocity lacks the fresh gradient",
        f"{FEEDBACK}/dgc.py",
        "v = trees.add(trees.add(v, u), g)",
        "v = trees.add(v, u)",
        (f"{KIN}::test_dgc",),
    ),
    Mutation(
        "DGC: every worker clips as if it were alone",
        f"{FEEDBACK}/dgc.py",
        "threshold = clip_norm / math.sqrt(collectives.axis_size(axis_name))",
        "threshold = clip_norm",
        (f"{KIN}::test_dgc_dense_leaves_have_plain_momentum_and_clipping_is_local",),
    ),
    Mutation(
        "DGC: the momentum of what was sent is kept",
        f"{FEEDBACK}/dgc.py",
        "jnp.where(mask, 0, x), u, out.support)",
        "x, u, out.support)",
        (f"{KIN}::test_dgc",),
    ),
    Mutation(
        "DoubleSqueeze: the server forgets what it did not send",
        f"{FEEDBACK}/double_squeeze.py",
        "v = trees.add(up.aggregate, E)",
        "v = up.aggregate",
        (f"{KIN}::test_double_squeeze",),
    ),
    Mutation(
        "dist-EF-SGDM: the server's residual is not corrected for the rate",
        f"{FEEDBACK}/dist_ef_sgdm.py",
        "q = trees.axpy(ratio, E, up.aggregate)",
        "q = trees.add(E, up.aggregate)",
        (f"{KIN}::test_dist_ef_sgdm",),
    ),
    Mutation(
        "Safe-EF: the objective is followed where the constraint is violated",
        f"{FEEDBACK}/safe_ef.py",
        "trees.where(safe, trees.wide(updates), constraint_grads)",
        "trees.where(safe, constraint_grads, trees.wide(updates))",
        (f"{KIN}::test_safe_ef",),
    ),
    Mutation(
        "variance-based: a variance that is not finite poisons its own worker alone",
        f"{FEEDBACK}/variance_based.py",
        "return jnp.where(ambiguous, 0, r) + 0 * v",
        "return jnp.where(ambiguous, 0, r)",
        (f"{VARIANCE}::test_one_bad_number_skips_the_step",),
    ),
    Mutation(
        "AdaComp: a bin with a NaN sends nothing",
        f"{FEEDBACK}/adacomp.py",
        "~(jnp.abs(H) < jnp.repeat(gmax, bin_size)[: G.size])",
        "jnp.abs(H) >= jnp.repeat(gmax, bin_size)[: G.size]",
        (f"{BAD}::test_no_bad_number_is_remembered[adacomp one bin]",),
    ),
    Mutation(
        "variance-based: the variance of what waits does not decay",
        f"{FEEDBACK}/variance_based.py",
        "forgotten = trees.scale(decay, v)",
        "forgotten = v",
        (f"{VARIANCE}::test_what_finds_no_room_waits",),
    ),
    Mutation(
        "FetchSGD: the sketch of the error is not cleared where values were sent",
        f"{FEEDBACK}/fetch_sgd.py",
        "S_e = S_e - S_D",
        "S_e = S_e + 0 * S_D",
        (f"{TESTS}/test_fetch_sgd.py::test_fetch_sgd",),
    ),
    # ---------------------------------------------------------------- local steps
    Mutation(
        "CSER: errors are reset one step after they are due",
        f"{MADE_OF}/own_models.py",
        "count % period == 0",
        "count % period == 1",
        (f"{KIN}::test_cser",),
    ),
    Mutation(
        "CSER: local models move by the whole gradient, not by what was not sent",
        f"{LOCAL}/cser.py",
        "sent, unsent, state_g = out.aggregate, out.residual, out.state",
        "sent, unsent, state_g = out.aggregate, g, out.state",
        (f"{KIN}::test_cser",),
    ),
    Mutation(
        "Qsparse-local-SGD: the drift stays after it was sent",
        f"{LOCAL}/qsparse_local_sgd.py",
        "return step, jax.tree.map(jnp.zeros_like, y), out.residual, out.state",
        "return step, y, out.residual, out.state",
        (f"{KIN}::test_qsparse_local_sgd",),
    ),
    Mutation(
        "local steps: the workers' models stay where they are at a synchronisation",
        f"{LOCAL}/local_steps.py",
        "return moved, jax.tree.map(jnp.zeros_like, ahead), new",
        "return moved, ahead, new",
        (f"{STEPS}::test_local_steps_against_numpy[DiLoCo]",),
    ),
    Mutation(
        "local steps: the drift has the wrong sign",
        f"{LOCAL}/local_steps.py",
        "drift = trees.scale(-1, ahead)",
        "drift = ahead",
        (f"{STEPS}::test_local_steps_against_numpy[DiLoCo]",),
    ),
    Mutation(
        "local steps: a bad gradient gets into the worker's own model",
        f"{MADE_OF}/own_models.py",
        "jnp.where(good, new, old)",
        "jnp.where(good | True, new, old)",
        (f"{STEPS}::test_a_worker_with_a_bad_gradient_leaves_out_its_own_step",),
    ),
    Mutation(
        "local steps: a bad gradient on one worker keeps the others from a synchronisation",
        f"{MADE_OF}/own_models.py",
        "dataclasses.replace(lift, accepted=None)",
        "dataclasses.replace(lift)",
        (f"{STEPS}::test_a_worker_with_a_bad_gradient_leaves_out_its_own_step",),
    ),
    Mutation(
        "streaming: a worker gives up all that it did meanwhile",
        f"{LOCAL}/streaming.py",
        "mixing * (a - u)",
        "0 * (a - u)",
        (f"{STEPS}::test_local_steps_against_numpy",),
    ),
    Mutation(
        "streaming: a fragment is applied one step late",
        f"{LOCAL}/streaming.py",
        "(count - delay) % period == due[o]",
        "(count - delay - 1) % period == due[o]",
        (f"{STEPS}::test_local_steps_against_numpy",),
    ),
    Mutation(
        "local steps: an optimizer's count starts again with other workers",
        "ef_optax/parallel/change_workers.py",
        "jnp.integer: COPY",
        "jnp.integer: FRESH",
        (f"{STEPS}::test_another_number_of_workers",),
    ),
    # ---------------------------------------------------------------- EF21
    Mutation(
        "the gradient is compressed, not its difference to the estimate",
        f"{MADE_OF}/difference.py",
        "out = exchange(sub(target, estimate), state, weight=weight",
        "out = exchange(target, state, weight=weight",
        (f"{EF21}::test_ef21",),
    ),
    Mutation(
        "the estimate of an absent worker moves",
        f"{MADE_OF}/difference.py",
        "own = out.sent if present is None else scale(present, out.sent)",
        "own = out.sent",
        (f"{EF21}::test_ef21_partial_participation",),
    ),
    Mutation(
        "a start from zero follows the first gradient",
        f"{MADE_OF}/difference.py",
        "return estimate, mean, after._replace(codec=state.codec)",
        "return target, mean, after._replace(codec=state.codec)",
        (f"{EF21}::test_ef21",),
    ),
    Mutation(
        "EF21+: of two equally near messages the one that forgets is taken",
        f"{FEEDBACK}/ef21_plus.py",
        "forget = error_b < error_m",
        "forget = error_b <= error_m",
        (f"{EF21}::test_ef21_plus",),
    ),
    Mutation(
        "EF21+: a forgotten estimate stays in the mean",
        f"{FEEDBACK}/ef21_plus.py",
        "return own, trees.sub(trees.add(g, out.aggregate), taken_back), out.state",
        "return own, trees.add(g, out.aggregate), out.state",
        (f"{EF21}::test_ef21_plus_forgets_and_still_agrees",),
    ),
    Mutation(
        "EF21-SGDM: the first average is a share of the first gradient",
        f"{MADE_OF}/average.py",
        "eta = jnp.where(steps == 0, jnp.ones_like(eta), eta)",
        "eta = jnp.where(steps < 0, jnp.ones_like(eta), eta)",
        (f"{EF21}::test_ef21_momentum",),
    ),
    Mutation(
        "EF21-BC: the server sends its estimate, not what is new in it",
        f"{FEEDBACK}/ef21_bidirectional.py",
        "out = downlink(trees.sub(mean, g), state.downlink)",
        "out = downlink(mean, state.downlink)",
        (f"{EF21}::test_ef21_bidirectional",),
    ),
    Mutation(
        "a memory that keeps a part of itself is not held to a bound",
        f"{MADE_OF}/needs.py",
        "return float(self.old**2 + self.error**2 * noise_error)",
        "return float(self.error**2)",
        (f"{TESTS}/test_noise.py::test_a_part_that_is_too_large_is_refused_with_the_remedy",),
    ),
    Mutation(
        "the weight of a fresh gradient is rounded to float32",
        f"{MADE_OF}/average.py",
        "eta = jnp.asarray(arguments.value_at(fresh_weight, steps))",
        "eta = jnp.asarray(arguments.value_at(fresh_weight, steps), jnp.float32)",
        ("tests/project/test_double_constants.py",),
    ),
    Mutation(
        "weights do not count the workers",
        f"{MADE_OF}/shares.py",
        "jnp.asarray([n * w for w in weights], float)",
        "jnp.asarray([w for w in weights], float)",
        (f"{EF21}::test_ef21_w_with_a_compressor_that_is_not_homogeneous",),
    ),
    Mutation(
        "workers draw the same numbers where each should have its own",
        f"{MADE_OF}/shares.py",
        "return key if shared else jax.random.fold_in(key, coll.axis_index(axis_name))",
        "return key",
        (f"{EF21}::test_ef21_partial_participation",),
    ),
    Mutation(
        "EF21-P: the model that is behind catches up as a whole",
        f"{FEEDBACK}/ef21_p.py",
        "behind = memory.write(out.residual,",
        "behind = memory.write(jax.tree.map(jnp.zeros_like, out.residual),",
        (f"{DIFFERENCES}::test_ef21_p",),
    ),
    # ---------------------------------------------------------------- differences
    Mutation(
        "EF-BV: nu is left out",
        f"{FEEDBACK}/ef_bv.py",
        "g = trees.axpy(nu, out.aggregate, h)",
        "g = trees.add(out.aggregate, h)",
        (f"{DIFFERENCES}::test_ef_bv",),
    ),
    Mutation(
        "DIANA: learns at the rate of another variance",
        f"{FEEDBACK}/ef_bv.py",
        "return 1 / (1 + omega)",
        "return 1 / (2 + omega)",
        (f"{DIFFERENCES}::test_diana_learns_at_the_rate_of_its_compressor",),
    ),
    Mutation(
        "EControl: the error is measured from the old estimate",
        f"{FEEDBACK}/econtrol.py",
        "grown = trees.add(e, trees.sub(g_i, h_i))",
        "grown = trees.add(e, trees.sub(g_i, memory.read(state.estimate)))",
        (f"{DIFFERENCES}::test_econtrol",),
    ),
    Mutation(
        "MARINA: the coin falls the other way",
        f"{FEEDBACK}/marina.py",
        "jax.random.uniform(draw) < probability)",
        "jax.random.uniform(draw) >= probability)",
        (f"{DIFFERENCES}::test_marina_takes_both_gradients_on_the_same_minibatch",),
    ),
    Mutation(
        "PP-MARINA: the mean is over all workers, not over those that take part",
        f"{FEEDBACK}/marina.py",
        "weight = present * collectives.axis_size(axis_name) / participants",
        "weight = present",
        (f"{DIFFERENCES}::test_pp_marina_averages_over_those_that_take_part",),
    ),
    Mutation(
        "CLAG: news is withheld when there is much, and sent when there is little",
        f"{FEEDBACK}/three_point_compressor.py",
        "news = (distance > jnp.asarray(self.zeta, drift.dtype) * drift)",
        "news = (distance < jnp.asarray(self.zeta, drift.dtype) * drift)",
        (f"{DIFFERENCES}::test_three_point_compressors",),
    ),
    Mutation(
        "3PC: the next round compares with the estimate, not with the last gradient",
        f"{FEEDBACK}/three_point_compressor.py",
        "last=memory.write(x, state.last, last.step),",
        "last=memory.write(own, state.last, last.step),",
        (f"{DIFFERENCES}::test_three_point_compressors",),
    ),
    Mutation(
        "STORM: the old gradient is not taken away",
        f"{ESTIMATORS}/storm.py",
        "moved = trees.add(memory.read(state.estimate), trees.sub(now, before))",
        "moved = trees.add(memory.read(state.estimate), now)",
        (f"{DIFFERENCES}::test_ef21_with_a_gradient_estimator",),
    ),
    Mutation(
        "IGT: looks behind instead of ahead",
        f"{ESTIMATORS}/igt.py",
        "trees.axpy(self.reach, trees.sub(params, self.last), params)",
        "trees.axpy(self.reach, trees.sub(self.last, params), params)",
        (f"{DIFFERENCES}::test_ef21_with_implicit_gradient_transport",),
    ),
    # ---------------------------------------------------------------- what all share
    Mutation(
        "two memories share one buffer",
        f"{MADE_OF}/difference.py",
        "g_i, g = self.memory.zeros(params), self.memory.zeros(params)",
        "g_i = g = self.memory.zeros(params)",
        (f"{TESTS}/test_modes.py::test_a_fresh_state_may_be_donated[ef21]",),
    ),
    Mutation(
        "the memory of a narrow leaf is as narrow",
        f"{MADE_OF}/memory.py",
        "return jnp.zeros_like(p, dtype)",
        "return jnp.zeros_like(p)",
        (
            f"{TESTS}/test_ef14.py::"
            "test_residual_is_float32_for_narrow_gradients_and_updates_keep_their_dtype",
        ),
    ),
    # ---------------------------------------------------------------- stored memories
    Mutation(
        "what a stored memory loses is counted in the last step only",
        f"{MADE_OF}/stored.py",
        "return {}, (message, lost + more)",
        "return {}, (message, more)",
        (f"{STORED}::test_every_rule_follows_numpy",),
    ),
    Mutation(
        "all workers round a memory with the same noise",
        f"{MADE_OF}/memory.py",
        "axis = None if shared else self.axis_name",
        "axis = None",
        (f"{STORED}::test_noise_is_fresh_in_every_step_and_of_each_workers_own",),
    ),
    Mutation(
        "a shared memory is rounded with each worker's own noise",
        f"{MADE_OF}/memory.py",
        "axis = None if shared else self.axis_name",
        "axis = self.axis_name",
        (f"{STORED}::test_what_all_workers_hold_stays_the_same_on_all",),
    ),
    Mutation(
        "a memory of another process has another form, because its key is another object",
        "ef_optax/_core/once.py",
        "return str(codec.dtype), np.asarray(jax.random.key_data(codec)).tobytes()",
        "return id(codec)",
        (f"{STORED}::test_a_checkpoint_goes_on_to_the_bit",),
    ),
    Mutation(
        "the messages of another number of workers are mixed without being decoded",
        "ef_optax/parallel/change_workers.py",
        "return jax.tree.map(_placed, old.mixed(weights), new)",
        "return jax.tree.map(_carry, old, new, role)",
        (f"{STORED}::test_another_number_of_workers_keeps_the_mean",),
    ),
    Mutation(
        "the messages of slices are not split over the model axes",
        "ef_optax/parallel/specs.py",
        "return jax.tree.map(lambda x: one(path, x), state)",
        "return jax.tree.map(lambda _: P(), state)",
        (f"{STORED}::test_every_device_stores_its_slice",),
    ),
    Mutation(
        "a random cast truncates",
        "ef_optax/compressors/quantize/cast.py",
        "up = words + (random_words(key, x.shape) >> 16)",
        "up = words",
        ("tests/compressors/test_codecs.py",),
    ),
    Mutation(
        "the key of a stored memory becomes an array of the program that makes the state",
        "ef_optax/_core/once.py",
        "with jax.ensure_compile_time_eval():",
        "if True:",
        (f"{STORED}::test_a_state_may_be_made_inside_a_program",),
    ),
    # ---------------------------------------------------------------- recipes
    Mutation(
        "EF-signSGD: the residual is in gradient units",
        "ef_optax/recipes/ef_sign_sgd.py",
        """        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        error_feedback(compressor, axis_name=axis_name, memory=memory),
""",
        """        error_feedback(compressor, axis_name=axis_name, memory=memory),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
""",
        (f"{RECIPES}::test_recipes_against_numpy",),
    ),
    Mutation(
        "DGC: weight decay has no Nesterov form",
        "ef_optax/recipes/dgc_sgd.py",
        "optax.trace(momentum, nesterov=nesterov)",
        "optax.trace(momentum)",
        (f"{RECIPES}::test_recipes_against_numpy",),
    ),
    Mutation(
        "1-bit Adam: the variance goes on after the warm-up",
        "ef_optax/recipes/one_bit_adam.py",
        "warm = state.feedback.exchange.step < freeze_step",
        "warm = state.feedback.exchange.step >= 0",
        (f"{RECIPES}::test_recipes_against_numpy",),
    ),
    Mutation(
        "1-bit Adam: what had no gradient is divided by eps",
        "ef_optax/recipes/one_bit_adam.py",
        "jnp.where(v == 0, 0, m)",
        "m",
        (f"{RECIPES}::test_what_had_no_gradient_does_not_move",),
    ),
    Mutation(
        "PowerSGD: the step is the momentum alone",
        "ef_optax/recipes/power_sgd_momentum.py",
        "plus(optax.trace(momentum))",
        "optax.trace(momentum)",
        (f"{RECIPES}::test_power_sgd_momentum_against_numpy",),
    ),
)
