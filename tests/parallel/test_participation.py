"""Workers that are absent from a step: means over the others, and memories that wait."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import ef_optax as ef
from ef_optax.parallel.change_workers import SHARDS, roles_of
from tests.feedback.rules import AXIS, together

N, D, STEPS, MOMENTUM = 4, 6, 5, 0.5
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MASKS = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], bool)


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    return np.where(np.isin(np.arange(x.size), kept), x, 0)


def lifted(where: str, tx: optax.GradientTransformation):
    if where == "simulate":
        return ef.simulate(tx, N, AXIS)
    kinds, devices = (KINDS[where],), jax.devices()[:N]
    mesh = jax.make_mesh((N,), (AXIS,), axis_types=kinds, devices=devices)
    return ef.data_parallel(tx, mesh, AXIS)


def gradients() -> np.ndarray:
    """An absent worker's gradient is not a number."""
    g = np.random.default_rng(0).standard_normal((STEPS, N, D)).astype(np.float32)
    return np.where(MASKS[..., None], g, np.nan)


@pytest.mark.parametrize(
    "where", ["simulate", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_error_feedback_of_those_present(where: str) -> None:
    """Local momentum and residual of an absent worker wait; the mean is over the others."""
    rule = ef.error_feedback(ef.top_k(k=2), axis_name=AXIS)
    tx = lifted(where, optax.chain(optax.trace(MOMENTUM), rule))
    state, update = tx.init(jnp.zeros(D)), jax.jit(tx.update)
    m, e = np.zeros((N, D)), np.zeros((N, D))
    for g, mask in zip(gradients(), MASKS, strict=True):
        updates, state = jax.block_until_ready(update(g, state, jnp.zeros(D), present=mask))
        total = np.zeros(D)
        for i in np.flatnonzero(mask):
            m[i] = MOMENTUM * m[i] + g[i]
            p = m[i] + e[i]
            c = top(p, 2)
            e[i] = p - c
            total += c
        np.testing.assert_allclose(updates, total / max(1, mask.sum()), atol=1e-6)
        np.testing.assert_allclose(state[0].trace, m, atol=1e-6)
        np.testing.assert_allclose(state[1].residual, e, atol=1e-6)
        assert int(state[1].exchange.skipped) == 0


def test_the_mean_of_estimates_is_over_all_workers() -> None:
    """EF21: those absent stay in the mean with their old estimates, as in EF21-PP."""
    tx = ef.simulate(ef.ef21(ef.top_k(k=2), axis_name=AXIS, init="full"), N, AXIS)
    state, update = tx.init(jnp.zeros(D)), jax.jit(tx.update)
    estimates = np.zeros((N, D))
    for t, (g, mask) in enumerate(zip(gradients(), MASKS[[1, 1, 2, 3, 4]], strict=True)):
        g = np.nan_to_num(g)
        updates, state = update(g, state, jnp.zeros(D), present=mask)
        for i in np.flatnonzero(mask):
            d = g[i] - estimates[i]
            estimates[i] += d if t == 0 else top(d, 2)
        np.testing.assert_allclose(state.estimate, estimates, atol=1e-6)
        np.testing.assert_allclose(updates, estimates.mean(0), atol=1e-6)


def test_an_absent_server_goes_on_to_serve_its_shard() -> None:
    """Two shots: the residual of a shard belongs to all workers, and does not wait."""
    shot = ef.exchanges.two_shot(ef.identity(), ef.top_k(k=1))
    tx = ef.simulate(ef.error_feedback(shot, axis_name=AXIS), 2, AXIS)
    state, mask = tx.init(jnp.zeros(4)), np.array([True, False])
    g = np.array([[4.0, 2.0, 3.0, 1.0], [9.0, 9.0, 9.0, 9.0]], np.float32)
    updates, state = tx.update(g, state, jnp.zeros(4), present=mask)
    assert updates.tolist() == [4.0, 0.0, 3.0, 0.0]
    assert state.exchange.codec.residual.tolist() == [[0.0, 2.0], [0.0, 1.0]]


FEW = ("econtrol", "three_point v1", "sparse_loco")
MORE = ("cser", "dgc", "diana", "dist_ef_sgdm", "ef21_plus", "ef21_w", "fetch_sgd", "marina")
MORE += ("normalised mvr", "one_bit_adam", "sharded_optimizer", "streaming", "two_shot")
"""Of every kind of memory: residuals, estimates, shifts, momenta, models ahead, shards."""


@pytest.mark.parametrize(
    "names", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_every_memory_waits_for_an_absent_worker(names: tuple[str, ...]) -> None:
    """Worker 1 is away for two steps: nothing of its own changes, and no step is skipped."""
    tx = ef.simulate(together(names), N, AXIS)
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,)}
    params = {n: {k: np.ones(s, np.float32) for k, s in shapes.items()} for n in names}

    def draw(bad: bool):
        one = {k: rng.standard_normal((N, *s)).astype(np.float32) for k, s in shapes.items()}
        for g in one.values() if bad else ():
            g[1] = np.nan
        return {n: one for n in names}

    update = jax.jit(tx.update)
    _, state = update(draw(False), tx.init(params), params, present=np.ones(N, bool))
    own, roles, before = tx.worker_axes(params), roles_of(state), state
    for _ in range(2):
        updates, state = update(draw(True), state, params, present=np.arange(N) != 1)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))

    def unchanged(mine: bool, role: str, old, new) -> None:
        if mine and role != SHARDS:
            np.testing.assert_array_equal(np.asarray(old)[1], np.asarray(new)[1])

    jax.tree.map(unchanged, own, roles, before, state)
    assert all(int(x.skipped) == 0 for x in ef.parallel.exchange_states(state))


def test_what_is_no_mask_is_refused() -> None:
    tx = ef.simulate(ef.error_feedback(ef.top_k(k=1), axis_name=AXIS), 2, AXIS)
    state = tx.init(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"present has shape \(3,\), but must be \(2,\)"):
        tx.update(jnp.zeros((2, 3)), state, jnp.zeros(3), present=np.ones(3, bool))
    tiers = ef.hierarchical([("a", ef.top_k(k=1)), ("b", ef.top_k(k=1))])
    tx = ef.simulate(tiers, (2, 2), ("b", "a"))
    with pytest.raises(ValueError, match="reaches only some of the workers"):
        tx.update(jnp.zeros((4, 3)), tx.init(jnp.zeros(3)), jnp.zeros(3), present=np.ones(4, bool))
