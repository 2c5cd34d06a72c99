"""Two tiers as a chain: one feedback inside each pod, the next between the pods."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.conftest import make_mesh

PODS, LOCAL, D, STEPS = 2, 2, 6, 5
AXES = ("pod", "data")


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    out = np.zeros_like(x)
    out[kept] = x[kept]
    return out


def oracle(grads: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Independent two-tier feedback: top-3 inside a pod, top-1 between pods."""
    x, e1, e2 = np.zeros(D), np.zeros((PODS, LOCAL, D)), np.zeros((PODS, D))
    for g in grads.reshape(-1, PODS, LOCAL, D):
        total = np.zeros(D)
        for pod in range(PODS):
            inside = np.zeros(D)
            for w in range(LOCAL):
                p = g[pod, w] + e1[pod, w]
                sent = top(p, 3)
                e1[pod, w] = p - sent
                inside += sent / LOCAL
            p = inside + e2[pod]
            sent = top(p, 1)
            e2[pod] = p - sent
            total += sent / PODS
        x = x - rate * total
    return x, e1.reshape(-1, D), e2


def chain(rate: float):
    return optax.chain(
        ef.error_feedback(ef.top_k(k=3), axis_name="data"),
        ef.error_feedback(ef.top_k(k=1), axis_name="pod"),
        optax.sgd(rate),
    )


def lifted(where: str, rate: float):
    if where == "simulate":
        return ef.simulate(chain(rate), (PODS, LOCAL), AXES)
    return ef.data_parallel(chain(rate), make_mesh((PODS, LOCAL), AXES), AXES)


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_two_tiers_follow_the_oracle_and_skip_together(where: str) -> None:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((STEPS, PODS * LOCAL, D)).astype(np.float32)
    tx = lifted(where, 0.5)
    params = jnp.zeros(D)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i, g in enumerate(grads):
        for value in (jnp.nan, 3e30) if i == 2 else ():  # of one worker of the first pod
            updates, state = update(jnp.asarray(grads[0]).at[1, 2].set(value), state, params)
            assert (np.asarray(updates) == 0).all()
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
    x, e1, e2 = oracle(grads.astype(np.float64), 0.5)
    np.testing.assert_allclose(params, x, atol=1e-5)
    np.testing.assert_allclose(state[0].residual, e1, atol=1e-5)
    between = np.asarray(state[1].residual).reshape(PODS, LOCAL, D)
    np.testing.assert_allclose(between, np.repeat(e2[:, None], LOCAL, 1), atol=1e-5)


def test_each_tier_differs_over_its_own_axes() -> None:
    flags = ef.parallel.worker_axes(chain(0.1), jnp.zeros(D), AXES, (PODS, LOCAL))
    assert (flags[0].residual, flags[1].residual) == (True, True)
