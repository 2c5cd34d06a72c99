"""With double precision enabled, the numbers that a user gives are not rounded to float32."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

WEIGHTS = (0.2, 0.3, 0.5)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def updated(tx: optax.GradientTransformation, grads: np.ndarray) -> np.ndarray:
    """The updates of three workers' gradients of each step."""
    lifted = ef.simulate(tx, 3, "w")
    params = jnp.zeros(grads.shape[2:])
    step = jax.jit(lambda s, g: lifted.update(g, s, params)[::-1])
    state, seen = lifted.init(params), []
    for g in grads:
        state, updates = step(state, jnp.asarray(g))
        seen.append(updates)
    assert seen[0].dtype == jnp.float64
    return np.stack(seen)


@pytest.mark.parametrize("compressor", [ef.identity(), ef.top_k(k=5)], ids=["summed", "gathered"])
def test_weights_of_workers(compressor: ef.Compressor) -> None:
    """What travels is weighted as given, and EF21-W's estimates are g/(n w)."""
    grads, weights = draw(3, 5), jnp.asarray(WEIGHTS)
    exchange = ef.extend.Exchange(compressor.codec, "w")

    def one(g, weight):
        return exchange(g, exchange.init(g), weight=weight).aggregate

    seen = jax.jit(jax.vmap(one, axis_name="w"))(jnp.asarray(grads), weights)
    np.testing.assert_allclose(seen[0], weights @ grads / 3, rtol=0, atol=1e-15)
    tx = ef.simulate(ef.ef21_w(compressor, WEIGHTS, axis_name="w"), 3, "w")
    _, state = jax.jit(tx.update)(jnp.asarray(grads), tx.init(jnp.zeros(5)), jnp.zeros(5))
    np.testing.assert_allclose(state.estimate, grads / (3 * weights[:, None]), rtol=1e-14)


def test_learning_rates() -> None:
    """The residual's factor is the ratio of the rates, of a number that waits."""
    rates = jnp.asarray([0.1, 0.07, 0.03])
    grads = np.zeros((3, 3, 2))
    grads[0], grads[2] = [1.0, 0.3], [0.0, 0.0]
    schedule = lambda t: rates[t]  # noqa: E731
    for tx, server in (
        (ef.error_feedback(ef.top_k(k=1), learning_rate=schedule, axis_name="w"), False),
        (ef.dist_ef_sgdm(ef.top_k(k=1), schedule, momentum=0.0, axis_name="w"), True),
    ):
        seen = updated(tx, grads)
        assert seen[0].tolist() == [1.0, 0.0], server
        np.testing.assert_allclose(seen[1], [0.0, 0.3 * (0.1 / 0.07)], rtol=1e-15)


def test_igt_looks_ahead_by_the_given_weight() -> None:
    tx = ef.estimators.igt(0.3)
    params = jnp.ones(2)
    state = tx.init(params)
    grads = {"params": params, **dict.fromkeys(ef.query_points(state, params), params)}
    _, state = jax.jit(tx.update)(params, state, params, grads=grads)
    point = ef.query_points(state, params + 1)["igt"]
    np.testing.assert_allclose(point, 2 + (1 - 0.3) / 0.3, rtol=1e-15)


def test_memories_of_other_workers() -> None:
    """Three workers become two; the mean residual stays."""
    rule = ef.error_feedback(ef.top_k(k=1), axis_name="w")
    params = jnp.zeros(4)
    old = ef.simulate(rule, 3, "w").init(params)._replace(residual=jnp.asarray(draw(3, 4)))
    new = ef.parallel.change_workers(old, ef.simulate(rule, 2, "w").init(params))
    np.testing.assert_allclose(new.residual.mean(0), draw(3, 4).mean(0), rtol=0, atol=1e-15)
