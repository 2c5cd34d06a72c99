"""PowerSGD as its authors' own tests assert it, and cases that break other systems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_08_error_feedback_identity() -> None:
    """original = returned + residual in float64, rank 2, 3 iterations, step after step."""
    with jax.enable_x64(True):
        tx = ef.error_feedback(ef.power_sgd(2, iterations=3))
        tree = {"w": jnp.asarray(normal(30, 20)), "k": jnp.asarray(normal(3, 3, 8, 16, seed=1))}
        state, update = tx.init(tree), jax.jit(tx.update)
        came = jax.tree.map(jnp.zeros_like, tree)
        gone = came
        for t in range(4):
            g = jax.tree.map(lambda x, t=t: x * (t + 1), tree)
            out, state = update(g, state)
            came, gone = jax.tree.map(jnp.add, came, g), jax.tree.map(jnp.add, gone, out)
            for k, x in came.items():
                assert x.dtype == jnp.float64
                np.testing.assert_allclose(gone[k] + state.residual[k], x, rtol=0, atol=1e-12)
                matrix = np.asarray(out[k]).reshape(-1, x.shape[-1])
                assert np.linalg.matrix_rank(matrix, tol=1e-9) == 2


def test_08_before_the_start_step_it_is_exact() -> None:
    """In float64, the mean to the last bit and no residual until the start step; then neither."""
    with jax.enable_x64(True):
        rule = ef.error_feedback(ef.power_sgd(2, start_step=3, iterations=3), axis_name="w")
        tx = ef.simulate(rule, 4, "w")
        params = jnp.zeros((30, 20))
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(5):
            g = normal(4, 30, 20, seed=t)
            out, state = update(jnp.asarray(g), state, params)
            exact = np.abs(np.asarray(out) - g.mean(0)).max() <= 1e-16
            assert exact == (t < 3) and (not np.asarray(state.residual).any()) == (t < 3)
        assert np.linalg.matrix_rank(np.asarray(out), tol=1e-9) == 2


def test_09_beyond_the_start_step_it_really_compresses(mesh4) -> None:
    """The compiled branches move 4 * 64 * 48 bytes, and the factors of rank 2."""
    rule = ef.error_feedback(ef.power_sgd(2, start_step=100), axis_name="data")
    tx = ef.data_parallel(rule, mesh4, "data")
    params = jnp.zeros((64, 48))
    lowered = jax.jit(tx.update).lower(jnp.zeros((4, 64, 48)), tx.init(params), params)
    report = ef.wire_report(lowered.compile())
    assert all(c.conditional and c.kind == "reduce" for c in report.collectives)
    flag = 4  # whether all is finite; it travels with one of the factors
    *factors, dense = sorted(c.message_bytes for c in report.collectives)
    assert dense == 4 * 64 * 48 + flag
    assert len(factors) == 2 and sum(factors) == 4 * 2 * (64 + 48) + flag


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["power_sgd", "acp_sgd", "svd"])
def test_09_a_zero_layer_stays_finite_and_20_a_zero_gradient_gives_zeros(name, dtype) -> None:
    """One layer without any gradient beside one that has some: zeros, no residual, no NaN."""
    tx = ef.error_feedback(getattr(ef, name)(2))
    tree = {"zero": jnp.zeros((12, 9), dtype), "other": jnp.asarray(normal(12, 9), dtype)}
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(3):
        out, state = update(tree, state)
        assert out["zero"].dtype == jnp.dtype(dtype)
        assert not np.asarray(out["zero"], np.float32).any()
        assert not np.asarray(state.residual["zero"]).any()
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(out))
    revived, _ = update({**tree, "zero": tree["other"]}, state)
    assert np.asarray(revived["zero"], np.float32).any()


@pytest.mark.parametrize("name", ["power_sgd", pytest.param("acp_sgd", marks=pytest.mark.slow)])
def test_09_resume_is_exact(name: str, tmp_path) -> None:
    """Saved before, at and after the start step: the restored run goes on bit by bit."""
    rule = ef.error_feedback(getattr(ef, name)(2, start_step=2), axis_name="w")
    tx = ef.simulate(optax.chain(rule, optax.sgd(0.1, momentum=0.9)), 3, "w")
    params = {"w": jnp.asarray(normal(12, 9), jnp.float32), "b": jnp.zeros(5)}
    state, update = tx.init(params), jax.jit(tx.update)
    states, outs = [], []
    gs = [
        jax.tree.map(lambda p, t=t: jnp.asarray(normal(3, *p.shape, seed=t), p.dtype), params)
        for t in range(5)
    ]
    for g in gs:
        states.append(state)
        out, state = update(g, state, params)
        outs.append(out)
    for t in (1, 2, 3):
        ef.save(tmp_path / str(t), tx, params=params, opt_state=states[t], step=t)
        resumed = ef.restore(tmp_path / str(t), tx, params=params).opt_state
        for g, expected in zip(gs[t:], outs[t:], strict=True):
            out, resumed = update(g, resumed, params)
            for k in params:
                np.testing.assert_array_equal(out[k], expected[k])
