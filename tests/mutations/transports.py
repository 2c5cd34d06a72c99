"""Faults of tiers, of shards, of messages that travel later, and of absent workers."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

FEEDBACK, EXCHANGES = "ef_optax/feedback", "ef_optax/exchanges"
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
)
