"""Faults of tiers, of shards, of messages that travel later, and of absent workers."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

FEEDBACK, EXCHANGES = "ef_optax/feedback", "ef_optax/exchanges"
AUTO = "tests/exchanges/test_auto.py"
DELAYED = "tests/exchanges/test_delayed.py"
PRESENT = "tests/parallel/test_participation.py"
SHARDED = "tests/feedback/test_sharded_optimizer.py"
TIERS = "tests/parallel/test_tiers.py"

MUTATIONS = (
    # ---------------------------------------------------------------- tiers
    Mutation(
        "tiers average from the slow links to the fast ones",
        f"{FEEDBACK}/hierarchical.py",
        "for axis_name, compressor in _checked(tiers)",
        "for axis_name, compressor in reversed(_checked(tiers))",
        (f"{TIERS}::test_tiers_follow_the_oracle_and_skip_together[simulate-three]",),
    ),
    Mutation(
        "what passes between tiers is rounded to the gradient's dtype",
        f"{FEEDBACK}/hierarchical.py",
        "chain.update(trees.wide(updates), state, params, **extra_args)",
        "chain.update(updates, state, params, **extra_args)",
        (f"{TIERS}::test_between_tiers_nothing_is_rounded_to_the_gradients_dtype",),
    ),
    Mutation(
        "two tiers may average over the same axis",
        f"{FEEDBACK}/hierarchical.py",
        "seen |= names",
        "names.clear()",
        (f"{TIERS}::test_what_is_no_list_of_tiers_is_refused",),
    ),
    # ---------------------------------------------------------------- the cheapest transport
    Mutation(
        "the cheapest transport is taken for the dearest",
        f"{EXCHANGES}/auto.py",
        "costs[way] <= WORTH * min(costs.values())",
        "costs[way] >= max(costs.values()) / WORTH",
        (f"{AUTO}::test_the_cheapest_is_chosen",),
    ),
    Mutation(
        "rounds cost nothing",
        f"{EXCHANGES}/auto.py",
        "+ price * len(_WAYS[way][1])",
        "+ 0 * price",
        (f"{AUTO}::test_by_codec_workers_latency_and_choice",),
    ),
    Mutation(
        "a choice between transports promises what only one of them keeps",
        f"{EXCHANGES}/auto.py",
        "return dataclasses.replace(common(*each), stateful=any(one.stateful for one in each))",
        "return dataclasses.replace(each[0], stateful=any(one.stateful for one in each))",
        (f"{AUTO}::test_what_does_not_fit_is_refused",),
    ),
    Mutation(
        "a transport is chosen as if there were one worker",
        "ef_optax/_exchange/exchange.py",
        "chosen = for_leaves(codec, self.paths, [like_of(x) for x in leaves], workers)",
        "chosen = for_leaves(codec, self.paths, [like_of(x) for x in leaves], 1)",
        (f"{AUTO}::test_it_exchanges_as_what_it_chose",),
    ),
    # ---------------------------------------------------------------- shards
    Mutation(
        "what a worker's message drops of its shard is forgotten",
        f"{FEEDBACK}/sharded_optimizer.py",
        "trees.sub(ahead, own)",
        "trees.sub(own, own)",
        (f"{SHARDED}::test_the_path_of_the_weights_is_ef21_p",),
    ),
    Mutation(
        "the optimizer sees the common weights in place of the exact ones",
        f"{FEEDBACK}/sharded_optimizer.py",
        "x = trees.add(state.behind, w)",
        "x = trees.wide(w)",
        (f"{SHARDED}::test_the_optimizer_sees_the_exact_weights",),
    ),
    Mutation(
        "the rounding of bfloat16 parameters is lost",
        f"{FEEDBACK}/sharded_optimizer.py",
        "own = jax.tree.map(_applied, out.sent, w, updates)",
        "own = out.sent",
        (f"{SHARDED}::test_bfloat16_parameters_lose_nothing",),
    ),
    Mutation(
        "the exact weights of another number of workers are mixed",
        f"{FEEDBACK}/sharded_optimizer.py",
        'roles = {"inner": "shards", "behind": "shards"}',
        'roles = {"inner": "shards"}',
        (f"{SHARDED}::test_another_number_of_workers_has_the_same_weights",),
    ),
    Mutation(
        "LoCo injects beta of its residual",
        "ef_optax/recipes/loco.py",
        "injection=1.0 - beta",
        "injection=beta",
        (f"{SHARDED}::test_loco_in_the_letters_of_the_paper[simulate]",),
    ),
    Mutation(
        "shards are taken from the first worker's place",
        "ef_optax/_rules/owned.py",
        "index = 0 if n == 1 else coll.axis_index(axis_name)",
        "index = 0",
        (f"{SHARDED}::test_the_optimizer_sees_the_exact_weights",),
    ),
    # ---------------------------------------------------------------- messages one step late
    Mutation(
        "the message of this step is sent in this step",
        f"{EXCHANGES}/delayed.py",
        "yield Gather(state.message, finite, early=True)",
        "yield Gather(message, finite, early=True)",
        (f"{DELAYED}::test_the_mean_of_the_step_before_is_applied[simulate]",),
    ),
    Mutation(
        "an early message travels with the header, which waits for the gradient",
        "ef_optax/_exchange/rounds.py",
        "if isinstance(request, Gather) and request.early:",
        "if isinstance(request, Permute) and self.weight is not None:",
        (f"{DELAYED}::test_the_transfer_needs_only_the_state_and_the_residual_needs_no_transfer",),
    ),
    Mutation(
        "what is on its way is forgotten if the number of workers changes",
        "ef_optax/parallel/change_workers.py",
        "return residual + codec.of_workers().astype(residual.dtype)",
        "return residual",
        (f"{DELAYED}::test_another_number_of_workers_keeps_what_is_on_its_way",),
    ),
    # ---------------------------------------------------------------- absent workers
    Mutation(
        "an absent worker's memory does not wait",
        "ef_optax/parallel/participation.py",
        "own = layout.stacked and role != SHARDS",
        "own = False",
        (f"{PRESENT}::test_error_feedback_of_those_present[simulate]",),
    ),
    Mutation(
        "an absent server forgets what it owes to the others",
        "ef_optax/parallel/participation.py",
        "own = layout.stacked and role != SHARDS",
        "own = layout.stacked",
        (f"{PRESENT}::test_an_absent_server_goes_on_to_serve_its_shard",),
    ),
    Mutation(
        "estimates of absent workers are left out of the mean",
        "ef_optax/_exchange/exchange.py",
        'normalize = self.normalize if self.estimates else "present"',
        'normalize = "present"',
        (f"{PRESENT}::test_the_mean_of_estimates_is_over_all_workers",),
    ),
    Mutation(
        "the first, dense estimates are averaged over those present",
        "ef_optax/_rules/difference.py",
        "Exchange(Identity(), exchange.axis_name, estimates=exchange.estimates)",
        "Exchange(Identity(), exchange.axis_name)",
        (f"{PRESENT}::test_the_mean_of_estimates_is_over_all_workers",),
    ),
    Mutation(
        "absent workers count in the divisor",
        "ef_optax/_exchange/exchange.py",
        'normalize = self.normalize if self.estimates else "present"',
        "normalize = self.normalize",
        (f"{PRESENT}::test_error_feedback_of_those_present[simulate]",),
    ),
    Mutation(
        "the gradient of an absent worker is used",
        "ef_optax/parallel/lift.py",
        "g = silenced(present, g)",
        "g = g",
        (f"{PRESENT}::test_error_feedback_of_those_present[simulate]",),
    ),
)
