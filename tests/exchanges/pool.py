"""Codecs whose message depends on other workers or leaves, or is chosen by a policy."""

from __future__ import annotations

from collections.abc import Callable

import optax

import ef_optax as ef

AXIS = "data"
TOP, SIGN = ef.top_k(k=2), ef.scaled_sign()

EXCHANGES: dict[str, Callable[[], ef.Compressor]] = {
    "acp_sgd": lambda: ef.acp_sgd(1),
    "arc_top_k": lambda: ef.arc_top_k(0.3, rank=1),
    "auto": lambda: ef.exchanges.auto(TOP),
    "carried": lambda: ef.exchanges.carried("mine", TOP, ef.extend.AllGather()),
    "count_sketch": lambda: ef.count_sketch(3, 5, k=2),
    "dion_factors": lambda: ef.dion_factors(1),
    "dense": lambda: ef.dense(optax.clip(1.0)),
    "delayed": lambda: ef.exchanges.delayed(TOP),
    "fcc": lambda: ef.fcc(SIGN, 2),
    "global_top_k": lambda: ef.global_top_k(0.3),
    "gather": lambda: ef.exchanges.gather(ef.identity()),
    "global_top_k_of_sum": lambda: ef.exchanges.global_top_k_of_sum(0.3),
    "global_top_k_of_sum-tree": lambda: ef.exchanges.global_top_k_of_sum(0.3, tree=True),
    "gradiveq": lambda: ef.gradiveq(0.5, samples=1, period=2, slice_size=2),
    "largest_of_sum": lambda: ef.exchanges.largest_of_sum(ef.mix_k(1, 1, 0)),
    "greedy_lore": lambda: ef.greedy_lore(1, period=2),
    "leader": lambda: ef.exchanges.leader(ef.block_top_k(k=1, block=2)),
    "leader_top_k": lambda: ef.exchanges.leader_top_k(k=2),
    "majority": lambda: ef.exchanges.majority(ef.two_bit()),
    "majority_vote": lambda: ef.exchanges.majority_vote(),
    "mean_of_senders": lambda: ef.exchanges.mean_of_senders(TOP),
    "mean_of_senders-votes": lambda: ef.exchanges.mean_of_senders(
        ef.dct_top_k(2, 1), values=ef.sign()
    ),
    "per_leaf": lambda: ef.per_leaf(lambda path, x: TOP if path == "w" else ef.identity()),
    "perm_k": lambda: ef.exchanges.perm_k(0),
    "power_sgd": lambda: ef.power_sgd(1),
    "bernoulli-rare": lambda: ef.bernoulli(0.3, 0),
    "random_k-rare": lambda: ef.random_k(key=1, k=1, scaled=True),
    "reduce": lambda: ef.exchanges.reduce(TOP),
    "random_k-shared": lambda: ef.random_k(0.3, 1, shared_mask=True),
    "scheduled": lambda: ef.scheduled([1], [ef.identity(), ef.natural(0)]),
    "shared_rows": lambda: ef.shared_rows(0.5, side="shorter"),
    "shared_rows-dct": lambda: ef.shared_rows(k=2, transform="dct"),
    "tree": lambda: ef.exchanges.tree(ef.random_k(0.3, 0)),
    "two_shot": lambda: ef.exchanges.two_shot(SIGN),
}
"""Codecs with their own exchange, beside those of the pool."""
