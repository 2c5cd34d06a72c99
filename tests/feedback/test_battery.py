"""The common battery of Optax transformations, run on every rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.feedback.rules import ALL, ALONE, AXIS, EVERY, FEW, RECIPES, RULES, N, thinned

TREES = {
    "empty": {},
    "bare array": np.ones((3, 2), np.float32),
    "odd leaves": {
        "none": None,
        "scalar": np.ones((), np.float32),
        "no elements": np.ones((0, 4), np.float32),
        "bfloat16": np.ones(5, jnp.bfloat16),
        "float16": np.ones(3, np.float16),
    },
}


def one_step(tx, gradient, params):
    inner = optax.with_extra_args_support(tx)
    state = inner.init(params)
    points = dict.fromkeys(ef.query_points(state, params), gradient)
    return state, *inner.update(gradient, state, params, grads=points, loss=jnp.float32(0))


def traced(tx, params):
    """Shapes of the state before, of the updates, of the state after, for each worker."""
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct((N, *x.shape), x.dtype), params)
    run = jax.vmap(lambda g: one_step(tx, g, params), axis_name=AXIS, axis_size=N)
    if not jax.tree.leaves(grads):  # nothing to map over: one worker is enough
        run = jax.vmap(lambda _: one_step(tx, grads, params), axis_name=AXIS, axis_size=N)
        return jax.eval_shape(run, jnp.zeros(N))
    return jax.eval_shape(run, grads)


# Those with arrays of another shape than the leaves: the memories of the others, and what they
# send, are made by the same functions, and all types are in test_modes.py.
SHAPED = {*FEW, "adacomp", "sharded_optimizer", "streaming", "variance_based"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHAPED else pytest.mark.slow) for n in ALL]
)
def test_trees_of_every_kind(name):
    """For any tree, updates are like the parameters and the state keeps its form.

    Its fields leave the name ``count`` to the optimizer, whose count ``optax.tree.get`` finds.
    """
    for kind in TREES if name in FEW else ("empty", "odd leaves"):
        params = jax.tree.map(jnp.asarray, TREES[kind])
        before, updates, after = traced(ALL[name](), params)
        form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert form(before) == form(after), kind
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(before)]
        assert name in RECIPES or not [path for path in paths if path.endswith(".count")]
        assert form(updates) == jax.tree.map(lambda x: ((N, *x.shape), x.dtype), params), kind


@pytest.mark.parametrize("name", thinned(EVERY))
def test_no_operation_on_the_parameters_in_the_state(name):
    """``optax.tree.map_params`` finds what is like the parameters, and gives the state back."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    lifted = ef.simulate(EVERY[name](), N, AXIS)
    state = jax.eval_shape(lifted.init, params)
    same = optax.tree.map_params(lifted, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert jax.tree.leaves(same) == jax.tree.leaves(state)


@pytest.mark.parametrize("name", thinned(RULES))
def test_rates_under_inject_hyperparams(name):
    """The optimizer's rate may be injected around the whole chain: everything else is static."""

    def make(rate):
        return optax.chain(RULES[name](), optax.sgd(rate))

    params = {"w": np.ones((3, 2), np.float32)}
    traced(optax.inject_hyperparams(make)(rate=0.1), params)


@pytest.mark.parametrize(
    "name",
    [
        "error_feedback",
        "pp-marina",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fetch_sgd", "dgc warm-up")),
    ],
)
def test_unknown_arguments_are_accepted_and_nothing_is_compiled_twice(name):
    lifted = ef.simulate(EVERY[name](), N, AXIS)
    params = {"w": jnp.ones((3, 2))}
    state = lifted.init(params)
    grads = {"w": jnp.ones((N, 3, 2))}
    points = dict.fromkeys(ef.query_points(state, params), grads)
    traces = []

    @jax.jit
    def update(grads, state, params, value):
        traces.append(1)
        return lifted.update(grads, state, params, grads=points, value=value)

    for t in range(4):
        updates, state = update(grads, state, params, jnp.float32(t))
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1


# The exchange skips a step for all rules alike (test_bad_gradients.py); these keep points, a table
# and a schedule beside their memories.
STEPS = {"fetch_sgd", "dgc warm-up", "qsparse_local_sgd"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in STEPS else pytest.mark.slow)
        for name in EVERY
        if name not in ALONE
    ],
)
def test_bad_steps_on_one_worker_change_nothing(name):
    """NaN before every step, even the first: the run equals one without them, on all workers."""
    lifted = ef.simulate(EVERY[name](), N, AXIS)
    params = {"w": jnp.ones((3, 2))}
    rng = np.random.default_rng(0)

    @jax.jit
    def update(g, state):
        other = jax.tree.map(lambda x: 0.5 * x, g)
        points = {p: g if p == "params" else other for p in ef.query_points(state, params)}
        return lifted.update(g, state, params, grads=points)

    clean = dirty = lifted.init(params)
    for _ in range(4):
        g = jnp.asarray(rng.normal(size=(N, 3, 2)), jnp.float32)
        nothing, dirty = update({"w": g.at[1, 2, 0].set(jnp.nan)}, dirty)
        assert not np.any(nothing["w"])
        got, dirty = update({"w": g}, dirty)
        expected, clean = update({"w": g}, clean)
        np.testing.assert_array_equal(got["w"], expected["w"])
    assert max(int(s.skipped) for s in ef.parallel.exchange_states(dirty)) == 4
    for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        if a.dtype not in (jnp.int32, bool):  # not the counters and flags
            np.testing.assert_array_equal(a, b)
