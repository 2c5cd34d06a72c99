"""A bad step does no harm: all workers skip it together and count it; every state stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

pytestmark = pytest.mark.usefixtures("standard_promotion")

N = 4
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(5)}


def chain(compressor):
    return optax.chain(
        optax.trace(0.9), ef.error_feedback(compressor, axis_name="data"), optax.adam(0.1)
    )


def gradients(step: int):
    rng = np.random.default_rng(step)
    draw = lambda p: jnp.asarray(rng.standard_normal((N, *p.shape)), jnp.float32)  # noqa: E731
    return {name: draw(p) for name, p in PARAMS.items()}


def poisoned(grads, value: float, worker: int):
    return {**grads, "b": grads["b"].at[worker, 2].set(value)}


def run(tx, steps):
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    params, state = PARAMS, tx.init(PARAMS)
    for grads in steps:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def without_counters(state):
    """The state without what the skip itself changes: the flag and the count of skips."""
    reset = lambda x: x._replace(skipped=0, ok=True)  # noqa: E731
    is_exchange = lambda x: isinstance(x, ef.extend.ExchangeState)  # noqa: E731
    return jax.tree.map(lambda x: reset(x) if is_exchange(x) else x, state, is_leaf=is_exchange)


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


CODECS = {
    "gathered": lambda: ef.top_k(0.3),
    "signs hide a NaN": ef.scaled_sign,
    "summed": ef.identity,
    "random": lambda: ef.random_k(0.3, 0),
    "norms tell": lambda: ef.qsgd(4, 1),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_run_equals_the_run_without_the_bad_steps(name: str, where: str, mesh4) -> None:
    base = chain(CODECS[name]())
    simulated = where == "simulate"
    tx = ef.simulate(base, N, "data") if simulated else ef.data_parallel(base, mesh4, "data")
    good = [gradients(s) for s in range(4)]
    bad = [
        good[0],
        poisoned(gradients(8), np.nan, 3),
        good[1],
        good[2],
        poisoned(gradients(9), -np.inf, 0),
        good[3],
    ]
    params, state = run(tx, bad)
    clean_params, clean_state = run(tx, good)
    assert_equal(params, clean_params)
    assert_equal(without_counters(state), without_counters(clean_state))
    (exchange,) = ef.parallel.exchange_states(state)
    assert int(exchange.skipped) == 2 and bool(exchange.ok)
    assert int(ef.parallel.exchange_states(clean_state)[0].skipped) == 0


def test_a_bad_step_emits_zeros_and_says_so() -> None:
    tx = ef.simulate(chain(ef.scaled_sign()), N, "data")
    state = tx.init(PARAMS)
    updates, state = tx.update(poisoned(gradients(0), np.nan, 1), state, PARAMS)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    assert not bool(ef.parallel.exchange_states(state)[0].ok)


def test_the_flag_costs_no_collective(mesh4) -> None:
    tx = ef.data_parallel(chain(ef.top_k(0.3)), mesh4, "data")
    state = tx.init(PARAMS)
    compiled = jax.jit(tx.update).lower(gradients(0), state, PARAMS).compile()
    assert ef.wire_report(compiled).rounds == 1


@pytest.mark.parametrize("compressor", [ef.scaled_sign, ef.identity], ids=["sign", "identity"])
def test_by_hand_it_is_loud_without_the_guard_and_skipped_with_it(compressor) -> None:
    tx = optax.chain(optax.trace(0.9), ef.error_feedback(compressor()))
    g = jnp.asarray([1.0, jnp.nan, 2.0])
    loud, _ = tx.update(g, tx.init(jnp.zeros(3)))
    assert np.isnan(loud).all()
    guarded = ef.parallel.guard(tx)
    state = guarded.init(jnp.zeros(3))
    updates, after = guarded.update(g, state)
    assert updates.tolist() == [0.0, 0.0, 0.0]
    assert_equal(without_counters(after), without_counters(state))
    assert int(ef.parallel.exchange_states(after)[0].skipped) == 1


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_finite_numbers_that_overflow_in_the_mean_are_skipped_too(where: str, mesh4) -> None:
    rule = ef.error_feedback(ef.scaled_sign(), axis_name="data")
    simulated = where == "simulate"
    tx = ef.simulate(rule, N, "data") if simulated else ef.data_parallel(rule, mesh4, "data")
    params = jnp.zeros(3)
    state = tx.init(params)
    updates, after = tx.update(jnp.full((N, 3), 3e38), state, params)
    assert (np.asarray(updates) == 0).all()
    assert_equal(without_counters(after), without_counters(state))
    assert int(after.exchange.skipped) == 1


def test_a_state_that_was_not_lifted_is_refused(mesh4) -> None:
    rule = ef.error_feedback(ef.scaled_sign(), axis_name="data")
    params, grads = jnp.zeros(3), jnp.ones((N, 3))
    for tx in (ef.simulate(rule, N, "data"), ef.data_parallel(rule, mesh4, "data")):
        with pytest.raises(ValueError, match="made by the chain inside"):
            tx.update(grads, rule.init(params), params)
