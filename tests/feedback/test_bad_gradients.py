"""A gradient with one bad number: every rule skips the step, and no later step pays for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from tests.feedback.rules import ALL, ALONE, AXIS, N, together

PARAMS = {"first": np.ones((3, 2), np.float32), "last": np.ones(5, np.float32)}
REFUSED = (np.nan, np.inf, -np.inf, 3.4e38, -1e20)
TAKEN = (8e18, -1e15)  # the norm of five is below the root of the largest number
WHERE = (("first", 0), ("last", -1), ("last", slice(None)))
WHO = ([2], [0, 1, 2, 3])

# Those that missed one of these before, and one that exchanges every few steps.
FEW = (
    "adacomp one bin",
    "error_feedback corrected",
    "qsparse_local_sgd",
    "three_point v1",
    "two_shot",
)


def draw(seed: int):
    rng = np.random.default_rng(seed)
    normal = lambda p: rng.standard_normal((N, *p.shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(normal, PARAMS)


def poisoned(value: float):
    """Gradients with this number at the begin and the end of the tree, or all over its end."""
    for leaf, at in WHERE:
        for workers in WHO:
            grads = draw(9)
            flat = grads[leaf].reshape(N, -1)
            flat[workers, at] = value
            yield (value, leaf, at, workers), grads


def guarded(name: str):
    """The state of all workers before the first step, and one step under a guard, compiled."""
    tx, params = together([name], around=ef.parallel.guard), {name: PARAMS}

    def local(state, grads):
        updates, after = tx.update({name: grads}, state, params)
        return updates, after, ef.parallel.exchange_states(after)[0].skipped

    init = jax.jit(jax.vmap(lambda _: tx.init(params), axis_name=AXIS))
    return init(jnp.zeros(N)), jax.jit(jax.vmap(local, axis_name=AXIS))


def remembered(state):
    """The state without what the skip itself changes: the flag and the count of skips."""
    reset = lambda x: x._replace(skipped=0, ok=True)  # noqa: E731
    is_exchange = lambda x: isinstance(x, ef.extend.ExchangeState)  # noqa: E731
    state = jax.tree.map(lambda x: reset(x) if is_exchange(x) else x, state, is_leaf=is_exchange)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in ALL if n not in ALONE],
)
def test_no_bad_number_is_remembered(name: str) -> None:
    """What is refused leaves no trace; after what is taken, normal steps are taken as well.

    At the first and at a later step. One program for each rule: what is bad, and where, is data.
    """
    fresh, step = guarded(name)
    later = step(step(fresh, draw(0))[1], draw(1))[1]
    for state in (fresh, later):
        before = remembered(state)
        for value in REFUSED:
            for case, grads in poisoned(value):
                updates, after, skipped = step(state, grads)
                assert (skipped == 1).all(), case
                assert not any(np.any(u) for u in jax.tree.leaves(updates)), case
                jax.tree.map(np.testing.assert_array_equal, remembered(after), before)
        for value in TAKEN:
            for case, grads in poisoned(value):
                now = state
                for seed in range(5):
                    _, now, skipped = step(now, draw(seed) if seed else grads)
                    assert not skipped.any(), (case, seed)
                assert all(np.isfinite(x).all() for x in remembered(now)), case
