"""Every rule with every codec: it raises at construction with the reason, or it works."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax.compressors.scheduled import Scheduled
from ef_optax.feedback._requires import NEEDS, REQUIRES
from tests.compressors.pool import CASES
from tests.feedback.rules import AXIS, COMPRESSED, SIGN, TOP, N

EXCHANGES = {
    "acp_sgd": lambda: ef.acp_sgd(1),
    "count_sketch": lambda: ef.count_sketch(3, 5, k=2),
    "dense": lambda: ef.dense(optax.clip(1.0)),
    "fcc": lambda: ef.fcc(SIGN, 2),
    "global_top_k": lambda: ef.global_top_k(0.3),
    "global_top_k_of_sum-tree": lambda: ef.global_top_k_of_sum(0.3, tree=True),
    "gradiveq": lambda: ef.gradiveq(0.5, samples=1, period=2, slice_size=2),
    "leader_top_k": lambda: ef.leader_top_k(k=2),
    "per_leaf": lambda: ef.per_leaf(lambda path, x: TOP if path == "w" else ef.identity()),
    "perm_k": lambda: ef.perm_k(0),
    "power_sgd": lambda: ef.power_sgd(1),
    "random_k-shared": lambda: ef.random_k(0.3, 1, shared_mask=True),
    "scheduled": lambda: ef.scheduled([1], [ef.identity(), ef.natural(0)]),
    "two_shot": lambda: ef.two_shot(SIGN, axis_name=AXIS),
}
"""Codecs with an exchange of their own, beside those of the pool."""

CODECS = {name: case.make for name, case in CASES.items()} | EXCHANGES
QUICK = {"top_k", "natural", "majority_vote", "global_top_k_of_sum", "perm_k"}
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}


def codec_parts(codec):
    """The codecs that may run: of a policy those of its leaves, of a schedule its stages."""
    likes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in PARAMS.items()}
    leaves = [codec.for_leaf(path, like) for path, like in likes.items()]
    stages = [leaf.codecs if isinstance(leaf, Scheduled) else (leaf,) for leaf in leaves]
    return [part for stage in stages for part in stage]


def lacks(rule, argument, codec):
    """The needs of the rule that the codec does not meet, by the declarations alone."""
    parts = codec_parts(codec)
    return [n for n in REQUIRES[rule][argument] if not all(NEEDS[n].met(part) for part in parts)]


def one_step(tx, gradient):
    """What one worker does: the state's start and one update."""
    inner = optax.with_extra_args_support(tx)
    state = inner.init(PARAMS)
    points = dict.fromkeys(ef.query_points(state, PARAMS), gradient)
    more = {"constraint": jnp.float32(0), "constraint_grads": gradient}
    return inner.update(gradient, state, PARAMS, grads=points, **more)


def trace(tx):
    """One step of N workers, traced; parameters keep their shapes and dtypes."""
    grads = {k: jax.ShapeDtypeStruct((N, *x.shape), x.dtype) for k, x in PARAMS.items()}
    run = jax.vmap(functools.partial(one_step, tx), axis_name=AXIS, axis_size=N)
    updates, _ = jax.eval_shape(run, grads)
    assert {k: (u.shape, u.dtype) for k, u in updates.items()} == {
        k: (x.shape, x.dtype) for k, x in grads.items()
    }


def test_the_table_and_the_makers_name_the_same_rules():
    listed = {(rule, argument) for rule, needs in REQUIRES.items() for argument in needs}
    assert listed == set(COMPRESSED)
    assert {need for needs in REQUIRES.values() for row in needs.values() for need in row} == set(
        NEEDS
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in CODECS]
)
def test_every_rule_with_this_codec_raises_or_works(name):
    for (rule, argument), make in COMPRESSED.items():
        compressor = CODECS[name]()
        missing = lacks(rule, argument, compressor.codec)
        if missing:
            with pytest.raises(ValueError, match=f"^{rule}: {argument}") as caught:
                make(compressor).init(PARAMS)  # a policy is asked where it sees the leaves
            text = str(caught.value)
            assert NEEDS[missing[0]].reason in text and NEEDS[missing[0]].remedy in text
        else:
            trace(make(compressor))


def test_each_need_is_missed_by_some_codec():
    """A need that every codec meets would test nothing."""
    for name, need in NEEDS.items():
        parts = [part for make in CODECS.values() for part in codec_parts(make().codec)]
        assert {need.met(part) for part in parts} == {True, False}, name


def test_a_policy_and_a_schedule_are_held_to_the_needs_of_each_part():
    bad = ef.per_leaf(lambda path, x: ef.majority_vote() if path == "b" else TOP)
    with pytest.raises(ValueError, match="at 'b', MajorityVote does not give the mean"):
        ef.ef21(bad).init(PARAMS)
    for stages in ([TOP, ef.majority_vote()], [TOP, bad]):
        with pytest.raises(ValueError, match="MajorityVote does not give the mean"):
            ef.ef21(ef.scheduled([5], stages)).init(PARAMS)


def test_rules_that_keep_the_mean_of_the_workers_need_additive_codecs():
    """A ``mean`` in a State is moved by the aggregate, while the estimates move by ``sent``."""
    keep = set()
    for (rule, argument), make in COMPRESSED.items():
        states = make(ef.identity()).init(PARAMS)
        nodes = states if type(states) is tuple else (states,)
        if argument == "compressor" and any("mean" in getattr(s, "_fields", ()) for s in nodes):
            keep.add(rule)
    assert len(keep) > 8
    assert {r for r in keep if "additive" not in REQUIRES[r]["compressor"]} == set()
