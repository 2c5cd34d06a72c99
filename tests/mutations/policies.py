"""Faults of the policies: schedules of a compressor, and what happens to a residual."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

POLICIES, AROUND = "ef_optax/policies", "ef_optax/_rules/residuals.py"
RESIDUALS = "tests/policies/test_residuals.py"
CONTROLLERS = "tests/policies/test_controllers.py"
SCHEDULES = "tests/policies/test_schedules.py"

MUTATIONS = (
    Mutation(
        "a schedule with a period counts from the last boundary",
        "ef_optax/compressors/combine/scheduled.py",
        "within = step if self.period is None else step % self.period",
        "within = step",
        (f"{SCHEDULES}::test_a_schedule_with_a_period_begins_again",),
    ),
    Mutation(
        "a flush comes one exchange late",
        f"{POLICIES}/flush.py",
        "return scheduled([period - 1], [compressor, special], period=period)",
        "return scheduled([period - 1], [special, compressor], period=period)",
        (f"{RESIDUALS}::test_after_a_flush_nothing_is_owed",),
    ),
    Mutation(
        "gradual compression takes the value at the beginning of a level",
        f"{POLICIES}/gradual.py",
        "(a + b) // 2",
        "a",
        (f"{SCHEDULES}::test_gradual_takes_the_middle_of_each_level",),
    ),
    Mutation(
        "a frozen field follows the other fields",
        f"{POLICIES}/freeze.py",
        "frozen = state.step >= step",
        "frozen = state.step > step",
        (f"{SCHEDULES}::test_a_frozen_variance_is_that_of_the_step",),
    ),
    Mutation(
        "a step uses the field that it would have had, and forgets it afterwards",
        f"{POLICIES}/freeze.py",
        "values[var] = jnp.where(frozen, swaps[var], value) if var in swaps else value\n"
        "    return [read(x) for x in jaxpr.outvars]",
        "values[var] = value\n"
        "    kept = {x: jnp.where(frozen, y, values[x]) for x, y in swaps.items()}\n"
        "    return [kept[x] if x in kept else read(x) for x in jaxpr.outvars]",
        (f"{SCHEDULES}::test_a_frozen_variance_is_that_of_the_step",),
    ),
    Mutation(
        "the part of the residual that is not injected is lost",
        f"{POLICIES}/steer_residual.py",
        "whole = trees.axpy(1 - value(injection, step), old, new)",
        "whole = new",
        (f"{RESIDUALS}::test_injection_and_flush_lose_nothing",),
    ),
    Mutation(
        "the norm is measured against the last one",
        f"{POLICIES}/steer_residual.py",
        "largest = jnp.maximum(norm, step.extra[1])",
        "largest = jnp.where(step.extra[1] > 0, step.extra[1], norm)",
        (f"{RESIDUALS}::test_every_policy_follows_numpy",),
    ),
    Mutation(
        "a residual in the units of the last learning rate is given back without the ratio",
        AROUND,
        "old = trees.scale(_change_of_units(_rule(name, state.rule), new), old)",
        "old = trees.scale(1, old)",
        (f"{RESIDUALS}::test_constant_factors_are_those_of_error_feedback",),
    ),
    Mutation(
        "what a policy drops is counted in the last step only",
        AROUND,
        "lambda count, x, y: count + jnp.sum",
        "lambda count, x, y: jnp.sum",
        (f"{RESIDUALS}::test_every_policy_follows_numpy",),
    ),
    Mutation(
        "a gradient of zero clips the whole residual",
        f"{POLICIES}/clip_residual.py",
        "bound = jnp.where(scale > 0, bound * scale, jnp.inf)",
        "bound = bound * scale",
        (f"{RESIDUALS}::test_a_gradient_of_zero_clips_nothing",),
    ),
    Mutation(
        "a growing loss scale shrinks the residual",
        f"{POLICIES}/rescale_residual.py",
        "scale(step) / jnp.where(last > 0, last, 1)",
        "jnp.where(last > 0, last, 1) / scale(step)",
        (f"{RESIDUALS}::test_a_changing_loss_scale_changes_no_bit",),
    ),
    Mutation(
        "the rate shrinks one step too late",
        f"{POLICIES}/compressed_rate.py",
        "step - start + 1",
        "step - start",
        (f"{SCHEDULES}::test_the_rate_shrinks_when_compression_begins",),
    ),
    Mutation(
        "the mean limit is the sum over the workers",
        f"{POLICIES}/clip_residual.py",
        "collectives.psum(s, axis_name) / workers",
        "collectives.psum(s, axis_name)",
        (f"{RESIDUALS}::test_every_policy_follows_numpy",),
    ),
    Mutation(
        "credit is saved without a limit",
        f"{POLICIES}/hold_bytes.py",
        "_choice(jnp.minimum(memory, max(prices)) + budget, prices)",
        "_choice(memory + budget, prices)",
        (f"{CONTROLLERS}::test_credit_has_a_limit",),
    ),
    Mutation(
        "what a window sends is paid for one exchange",
        f"{POLICIES}/hold_bytes.py",
        "tuple(-(-self.window * cost // unit) for cost in costs)",
        "tuple(-(-cost // unit) for cost in costs)",
        (f"{CONTROLLERS}::test_decisions_follow_numpy",),
    ),
    Mutation(
        "a level that was not enough is never tried again",
        f"{POLICIES}/hold_contraction.py",
        "| (known.age >= self.retry)",
        "| (known.age < 0)",
        (f"{CONTROLLERS}::test_decisions_follow_numpy",),
    ),
    Mutation(
        "every worker decides by its own contraction",
        "ef_optax/_exchange/controlled.py",
        "lambda: coll.psum(own, axis)",
        "lambda: coll.psum(own, axis) * 0 + own",
        (f"{CONTROLLERS}::test_decisions_follow_numpy",),
    ),
    Mutation(
        "the sums go on after a decision",
        "ef_optax/_exchange/controlled.py",
        "jnp.where(due, 0, own)",
        "own",
        (f"{CONTROLLERS}::test_decisions_follow_numpy",),
    ),
    Mutation(
        "the level is chosen by the step",
        "ef_optax/_exchange/controlled.py",
        "return control.level if isinstance(codec, LevelPolicy) else step",
        "return step",
        (f"{CONTROLLERS}::test_decisions_follow_numpy",),
    ),
    Mutation(
        "rows are chosen by their largest value",
        "ef_optax/compressors/sparse/row_top_k.py",
        "jnp.sum(wide * wide, axis=1)",
        "jnp.max(wide * wide, axis=1)",
        ("tests/compressors/test_sparsifiers.py::test_row_top_k_by_hand",),
    ),
    Mutation(
        "uses are rounded down, so that the limit is exceeded",
        "ef_optax/_rules/allocation.py",
        "np.ceil(use * (parts / limit) * (1 - 1e-12))",
        "np.floor(use * (parts / limit))",
        ("tests/policies/test_allocation.py::test_the_least_error_within_the_bytes",),
    ),
    Mutation(
        "a layer is critical only if its norm grows",
        f"{POLICIES}/accordion.py",
        "abs(before - now) / before",
        "(now - before) / before",
        ("tests/policies/test_allocation.py::test_accordion_is_light_where_the_norm_changes",),
    ),
    Mutation(
        "the first level that contracts enough is taken, not the cheapest",
        f"{POLICIES}/with_contraction.py",
        "np.where(enough, bits, most + errors)",
        "np.where(enough, 0, most + errors)",
        ("tests/policies/test_allocation.py::test_a_contraction_is_held_by_the_cheapest_level",),
    ),
)
