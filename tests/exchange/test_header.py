"""The header of a step: without the lift it alone tells all workers of a bad number of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._exchange.exchange import Exchange

N = 4
GOOD = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)

RULES = {
    "a gather": lambda: ef.error_feedback(ef.top_k(k=2), axis_name="w"),
    "a sum": lambda: ef.error_feedback(ef.identity(), axis_name="w"),
    "adacomp": lambda: ef.adacomp(6, axis_name="w"),  # one bin: no other one sends the bad scale
}


def first_step(tx, grads, **of_workers):
    """Updates, and the flag and the count of the exchange, of every worker without the lift."""

    def one(g, extra):
        updates, state = tx.update(g, tx.init(g), g, **extra)
        return updates, state.exchange.ok, state.exchange.skipped

    return jax.jit(jax.vmap(one, axis_name="w"))(grads, of_workers)


def bad_at(value: float, worker: int) -> np.ndarray:
    grads = GOOD.copy()
    grads[worker, 1] = value
    return grads


def require_refused(updates, ok, skipped) -> None:
    assert np.isnan(updates).all()
    assert not ok.any()
    assert (skipped == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rule", RULES)
def test_one_bad_number_of_one_worker_is_known_to_all(rule: str, value: float) -> None:
    updates, ok, skipped = first_step(RULES[rule](), GOOD)
    assert np.isfinite(updates).all()
    assert ok.all()
    assert not skipped.any()
    require_refused(*first_step(RULES[rule](), bad_at(value, N - 1)))


@pytest.mark.parametrize("what", ["gradient", "squares"])
def test_a_variance_that_is_not_finite_is_known_to_all(what: str) -> None:
    tx, bad = ef.variance_based(1.0, capacity=0.5, axis_name="w"), bad_at(np.nan, 2)
    grads, squares = (bad, GOOD**2) if what == "gradient" else (GOOD, bad**2)
    require_refused(*first_step(tx, grads, squares=jnp.asarray(squares)))


def test_the_header_travels_once(mesh4) -> None:
    """PowerSGD sums its factors of an 8 x 6 matrix in two rounds; signs are gathered in the first.

    Twelve signs and their scale take two words, and two words tell of all numbers of the worker.
    """
    pick = lambda path, leaf: ef.power_sgd(1) if leaf.ndim == 2 else ef.scaled_sign()  # noqa: E731
    exchange = Exchange(ef.per_leaf(pick).codec, "data")

    def one(x):
        x = jax.tree.map(lambda leaf: leaf[0], x)
        return exchange(x, exchange.init(x)).aggregate

    mapped = jax.shard_map(one, mesh=mesh4, in_specs=jax.P("data"), out_specs=jax.P())
    leaves = {"matrix": jnp.ones((N, 8, 6)), "vector": jnp.ones((N, 12))}
    report = ef.wire_report(jax.jit(mapped).lower(leaves).compile())
    assert (report.rounds, report.message_bytes) == (3, 4 * (8 + 6 + 2 + 2))
