"""Faults of the ways in which messages travel."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

HERE = "ef_optax/exchanges"
TESTS = "tests/exchanges/test_exchanges.py::"
KIN = "tests/feedback/test_ef14_kin.py::"
SIGNS = "tests/compressors/test_signs.py::"

MUTATIONS = (
    Mutation(
        "a coordinate is averaged over all workers, not over its senders",
        f"{HERE}/senders.py",
        "aggregate=total / safe_divisor(self._senders(codec, got, like)),",
        "aggregate=total / jnp.asarray(got.total, total.dtype),",
        ("tests/exchanges/test_transports.py::test_a_pair_that_fits_works[top_k-mean_of_senders]",),
    ),
    Mutation(
        "two-shot: the padding of the last shard is owed",
        f"{HERE}/two_shot.py",
        "after = jnp.where(real, down.residual(), 0)",
        "after = down.residual()",
        (f"{KIN}test_two_shot_shards_are_cut_anew_for_other_workers",),
    ),
    Mutation(
        "two-shot: the server forgets what it owes",
        f"{HERE}/two_shot.py",
        "up.aggregate + state.residual.astype(x.dtype)",
        "up.aggregate",
        (f"{KIN}test_two_shot_is_double_squeeze_shard_by_shard",),
    ),
    Mutation(
        "two-shot: all rows of a worker draw the same numbers",
        f"{HERE}/shards.py",
        "jax.tree.map(lambda k: jax.random.fold_in(k, j), key)",
        "key",
        (f"{TESTS}test_the_rows_of_two_shot_draw_apart",),
    ),
    Mutation(
        "the leader is always the same worker",
        f"{HERE}/leader.py",
        "leads = workers.step % workers.size == workers.index",
        "leads = workers.index == 0",
        (f"{KIN}test_scalecom",),
    ),
    Mutation(
        "the tree's sum is taken for the mean",
        f"{HERE}/tree.py",
        'aggregate=scatter(result["values"], chosen, like) / jnp.asarray(n, x.dtype)',
        'aggregate=scatter(result["values"], chosen, like)',
        (f"{TESTS}test_global_top_k_tree_against_numpy",),
    ),
    Mutation(
        "the tree keeps an index twice that two workers have sent",
        f"{HERE}/tree.py",
        "total = jnp.where(first, sums[run], jnp.zeros((), values.dtype))",
        "total = values",
        (f"{TESTS}test_global_top_k_tree_against_numpy",),
    ),
    Mutation(
        "gTop-k: what was sent but not applied is forgotten",
        f"{HERE}/global_top_k_of_sum.py",
        "return jnp.where(applied, codec.decode(message, like), jnp.zeros((), x.dtype))",
        "return codec.decode(message, like)",
        (f"{TESTS}test_global_top_k_of_sum_gives_back_what_was_not_applied",),
    ),
    Mutation(
        "perm-k: a worker's share is not scaled by the number of workers",
        f"{HERE}/perm.py",
        "sent = scatter(values * jnp.asarray(n, x.dtype), own, like)",
        "sent = scatter(values, own, like)",
        (f"{SIGNS}test_perm_k_conserves_under_feedback",),
    ),
    Mutation(
        "perm-k: every worker draws its own permutation",
        f"{HERE}/perm.py",
        "workers.fold(self.key, shared=True)",
        "workers.fold(self.key)",
        (f"{SIGNS}test_perm_k_is_exact_for_equal_inputs",),
    ),
    Mutation(
        "a tie of votes counts as plus",
        f"{HERE}/majority.py",
        "aggregate=jnp.sign(outcome.aggregate)",
        "aggregate=jnp.where(outcome.aggregate >= 0, 1.0, -1.0)",
        (f"{SIGNS}test_majority_vote_and_its_ties",),
    ),
)
