"""Faults of what crosses a cut of a pipeline."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

CUT, AQ_SGD = "ef_optax/activations/_cut.py", "ef_optax/activations/aq_sgd.py"
TESTS = "tests/activations/test_activations.py"

MUTATIONS = (
    Mutation(
        "activations are sent themselves, and not their difference from the memory",
        AQ_SGD,
        "a - Memory.read(at(own))",
        "a",
        (f"{TESTS}::test_aq_sgd_against_numpy",),
    ),
    Mutation(
        "a batch is dense only if all of its examples are new",
        AQ_SGD,
        "jnp.any(known & ~state.seen[own])",
        "jnp.all(known & ~state.seen[own])",
        (f"{TESTS}::test_aq_sgd_against_numpy",),
    ),
    Mutation(
        "a stage between two others has one memory for both links",
        AQ_SGD,
        "second_half = num_examples if cut.relays() else 0",
        "second_half = 0",
        (f"{TESTS}::test_a_stage_between_two_others_remembers_both_links",),
    ),
    Mutation(
        "activations that are not finite are remembered",
        AQ_SGD,
        "slots = jnp.where(_finite(m), slots, -1)",
        "slots = jnp.where(True, slots, -1)",
        (f"{TESTS}::test_what_is_not_finite_and_padding_is_not_remembered",),
    ),
    Mutation(
        "the gradient goes the way of the activations",
        CUT,
        "return self._moved(message, [(target, source) for source, target in self.links()])",
        "return self._moved(message, self.links())",
        (f"{TESTS}::test_the_identity_is_a_plain_ppermute",),
    ),
    Mutation(
        "all examples of a batch have the same noise",
        CUT,
        "jax.random.split(key, x.shape[0])",
        "jnp.stack([key] * x.shape[0])",
        (f"{TESTS}::test_activations_keep_their_dtype_and_draw_new_numbers_at_every_step",),
    ),
)
