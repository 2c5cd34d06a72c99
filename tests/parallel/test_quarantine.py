"""A bad step does no harm: all workers skip it together and count it; every state stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.conftest import make_mesh

pytestmark = pytest.mark.usefixtures("standard_promotion")

N = 4
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(5)}
CODECS = {
    "gathered": lambda: ef.top_k(0.3),
    "signs hide a NaN": ef.scaled_sign,
    "summed": ef.identity,
    "random": lambda: ef.random_k(0.3, 0),
    "norms tell": lambda: ef.qsgd(4, 1),
}


def chain(compressor):
    return optax.chain(
        optax.trace(0.9), ef.error_feedback(compressor, axis_name="data"), optax.adam(0.1)
    )


def lifted(tx, where: str):
    if where == "simulate":
        return ef.simulate(tx, N, "data")
    return ef.data_parallel(tx, make_mesh((N,), ("data",)), "data")


def gradients(step: int, params=PARAMS):
    rng = np.random.default_rng(step)
    draw = lambda p: rng.standard_normal((N, *p.shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, params)


def poisoned(grads, value: float, worker: int):
    bad = grads["b"].copy()
    bad[worker, 2] = value
    return {**grads, "b": bad}


def without_counters(state):
    """The state without what the skip itself changes: the flag and the count of skips."""
    reset = lambda x: x._replace(skipped=0, ok=True)  # noqa: E731
    is_exchange = lambda x: isinstance(x, ef.extend.ExchangeState)  # noqa: E731
    return jax.tree.map(lambda x: reset(x) if is_exchange(x) else x, state, is_leaf=is_exchange)


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("where", ["simulate", pytest.param("mesh", marks=pytest.mark.slow)])
def test_run_equals_the_run_without_the_bad_steps(where: str) -> None:
    """A bad number in any one leaf, whatever compresses it, at any worker."""
    params = dict.fromkeys(CODECS, PARAMS)
    policy = ef.per_leaf(lambda path, like: CODECS[path.split("/")[0]]())
    tx = lifted(chain(policy), where)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(steps):
        now, state = params, tx.init(params)
        for grads in steps:
            now, state = step(grads, state, now)
        return now, state

    good = [gradients(s, params) for s in range(4)]
    bad = []
    for i, name in enumerate(CODECS):
        grads = gradients(8 + i, params)
        value = (np.nan, -np.inf)[i % 2]
        bad.append({**grads, name: poisoned(grads[name], value, i % N)})
    now, state = run([good[0], *bad[:2], good[1], *bad[2:4], *good[2:], bad[4]])
    clean, clean_state = run(good)
    assert_equal(now, clean)
    assert_equal(without_counters(state), without_counters(clean_state))
    (exchange,) = ef.parallel.exchange_states(state)
    assert int(exchange.skipped) == len(CODECS) and not bool(exchange.ok)
    assert int(ef.parallel.exchange_states(clean_state)[0].skipped) == 0


def test_the_flag_costs_no_collective() -> None:
    tx = lifted(ef.error_feedback(ef.top_k(0.3), axis_name="data"), "mesh")
    state = tx.init(PARAMS)
    program = jax.jit(tx.update).lower(gradients(0), state, PARAMS).compile()
    assert ef.wire_report(program).rounds == 1


@pytest.mark.parametrize("compressor", [ef.scaled_sign, ef.identity], ids=["sign", "identity"])
def test_by_hand_it_is_loud_without_the_guard_and_skipped_with_it(compressor) -> None:
    tx = optax.chain(optax.trace(0.9), ef.error_feedback(compressor()))
    g = jnp.asarray([1.0, jnp.nan, 2.0])
    loud, _ = jax.jit(tx.update)(g, tx.init(jnp.zeros(3)))
    assert np.isnan(loud).all()
    guarded = ef.parallel.guard(tx)
    state = guarded.init(jnp.zeros(3))
    updates, after = jax.jit(guarded.update)(g, state)
    assert updates.tolist() == [0.0, 0.0, 0.0]
    assert_equal(without_counters(after), without_counters(state))
    assert int(ef.parallel.exchange_states(after)[0].skipped) == 1


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_numbers_that_may_overflow_or_do_are_skipped_too(where: str) -> None:
    """Gradients too large to be remembered, and finite ones of which the chain makes infinities."""
    rule = ef.error_feedback(ef.scaled_sign(), axis_name="data")
    tx, params = lifted(optax.chain(rule, optax.scale(1e30)), where), jnp.zeros(3)
    state = tx.init(params)
    for i, value in enumerate((1e5, 1e20, 1e15)):
        updates, after = tx.update(jnp.full((N, 3), value), state, params)
        (exchange,) = ef.parallel.exchange_states(after)
        assert int(exchange.skipped) == (i > 0)
        assert (np.asarray(updates) == 0).all() == (i > 0)
        if i:
            assert_equal(without_counters(after), without_counters(state))


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_arguments_of_one_worker_are_watched_as_its_gradient_is(where: str) -> None:
    tx, params = lifted(ef.marina(ef.identity(), 0.5, 0, axis_name="data"), where), jnp.zeros(3)
    state = tx.init(params)
    good = jnp.ones((N, 3))
    for value, skipped in ((1e20, 1), (1e15, 0)):
        grads = {"params": good, "marina": good.at[1, 2].set(value)}
        _, after = tx.update(good, state, params, grads=grads)
        assert int(ef.parallel.exchange_states(after)[0].skipped) == skipped


def test_a_state_that_was_not_lifted_is_refused() -> None:
    rule = ef.error_feedback(ef.scaled_sign(), axis_name="data")
    params, grads = jnp.zeros(3), jnp.ones((N, 3))
    for where in ("simulate", "mesh"):
        with pytest.raises(ValueError, match="made by the chain inside"):
            lifted(rule, where).update(grads, rule.init(params), params)
