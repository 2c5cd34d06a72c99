"""Low-rank compressors against NumPy, alone and between workers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax.compressors.low_rank import atomo, svd
from ef_optax.compressors.power_sgd import power_sgd
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.parallel.simulation import simulate

WORKERS = 3


def gradients(shape, count=1, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, WORKERS, *shape)).astype(np.float32)


def workers(compressor, shape):
    tx = simulate(error_feedback(compressor, axis_name="data"), WORKERS, "data")
    return tx, tx.init(jnp.zeros(shape)), jax.jit(tx.update)


def residual(state) -> np.ndarray:
    return np.asarray(jax.tree.leaves(state.residual)[0])


def reference(q, gradients, *, iterations=1, local=False):
    """PowerSGD with error feedback as it is printed: outputs and memories after each step."""
    memory = np.zeros(gradients.shape[1:], np.float64)
    for g in gradients.astype(np.float64):
        m = g + memory
        for _ in range(iterations):
            p = np.linalg.qr(m.mean(0) @ q)[0]
            own = m.transpose(0, 2, 1) @ p
            q = own.mean(0)
        out = p @ q.T
        memory = m - (p @ own.transpose(0, 2, 1) if local else out)
        yield out, memory


@pytest.mark.parametrize(("iterations", "local"), [(1, False), (2, True)])
def test_power_sgd_between_workers(iterations: int, local: bool) -> None:
    """Three workers, three steps, warm start: outputs and memories of Algorithm 1."""
    compressor = power_sgd(2, iterations=iterations, local_error=local)
    tx, state, update = workers(compressor, (12, 7))
    gs = gradients((12, 7), 3)
    first = np.asarray(compressor.codec.init(jnp.zeros((12, 7)), ""), np.float64)
    for g, (out, memory) in zip(
        gs, reference(first, gs, iterations=iterations, local=local), strict=True
    ):
        sent, state = update(jnp.asarray(g), state, jnp.zeros((12, 7)))
        np.testing.assert_allclose(sent, out, atol=2e-5)
        np.testing.assert_allclose(residual(state), memory, atol=2e-5)


def test_power_sgd_error_feedback_identity() -> None:
    """original = returned + residual; a convolution is (height, width, inputs) by outputs."""
    shape = (3, 3, 4, 8)
    tx = error_feedback(power_sgd(2, iterations=3))
    g = jnp.asarray(gradients(shape)[0, 0])
    out, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(out + residual(state).reshape(shape), g, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(out).reshape(36, 8), tol=1e-3) == 2
    assert power_sgd(2).codec.traffic(shape, "float32", 4) == (2 * 36 * 32, 2 * 8 * 32)


def test_power_sgd_is_exact_at_its_rank() -> None:
    """rank(M) <= r and one worker: the output is M after one step."""
    rng = np.random.default_rng(1)
    m = (rng.standard_normal((20, 3)) @ rng.standard_normal((3, 15))).astype(np.float32)
    compressor = power_sgd(3)
    out, _ = compressor.update(jnp.asarray(m), compressor.init(jnp.asarray(m)))
    np.testing.assert_allclose(out, m, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_power_sgd_survives_zeros(dtype: str) -> None:
    """A zero gradient gives zeros, no residual, and keeps the directions for the next one."""
    zero, g = jnp.zeros((10, 8), dtype), jnp.asarray(gradients((10, 8))[0, 0], dtype)
    compressor = power_sgd(2)
    start = compressor.init(zero)
    out, state = compressor.update(zero, start)
    assert out.dtype == zero.dtype and (np.asarray(out, np.float32) == 0).all()
    after, _ = compressor.update(g, state)
    direct, _ = compressor.update(g, start)
    assert np.array_equal(np.asarray(after, np.float32), np.asarray(direct, np.float32))


def test_small_leaves_are_dense() -> None:
    """Vectors, scalars and leaves that would not shrink enough are averaged without error."""
    compressor = power_sgd(2, min_compression=2)
    g = {"b": jnp.arange(3.0), "s": jnp.asarray(2.0), "w": jnp.ones((4, 6)), "e": jnp.zeros((0, 4))}
    out, state = compressor.update(g, compressor.init(g))
    assert all(np.array_equal(out[k], g[k]) for k in g)
    assert compressor.bits((4, 6)) == 24 * 32 and compressor.bits((40, 60)) == 200 * 32
    assert not jax.tree.leaves(state.codec)


def test_svd_is_the_best_approximation() -> None:
    m = gradients((9, 14))[0, 0]
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    compressor = svd(3)
    out, _ = compressor.update(jnp.asarray(m), compressor.init(None))
    np.testing.assert_allclose(out, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    assert compressor.codec.alpha((9, 14)) == 1 / 3 and compressor.bits((9, 14)) == 3 * 23 * 32


def test_svd_attains_its_alpha() -> None:
    """Of an orthogonal matrix rank r keeps r of n equal parts."""
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))[0].astype(np.float32)
    out = np.asarray(svd(2).update(jnp.asarray(q), svd(2).init(None))[0])
    assert 1 - np.sum((out - q) ** 2) / np.sum(q**2) == pytest.approx(2 / 8, rel=1e-4)


def test_atomo_variance_formula() -> None:
    """sum s_j^2 (1/p_j - 1) with p_j = min(1, r s_j/sum s)."""
    m = gradients((14, 12), seed=3)[0, 0]
    s = np.linalg.svd(m, compute_uv=False)
    expected = np.sum(s**2 * (1 / np.minimum(1, s / s.sum()) - 1))
    codec, like = atomo(1, 0).codec, jax.ShapeDtypeStruct(m.shape, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2000)
    x = jnp.asarray(m)
    y = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))(keys)
    error = np.sum((np.asarray(y, np.float64) - m) ** 2, axis=(1, 2))
    assert error.mean() == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: power_sgd(0), "rank=0"),
        (lambda: power_sgd(2, iterations=0), "iterations=0"),
        (lambda: power_sgd(2, min_compression=0.5), "min_compression=0.5"),
        (lambda: svd(-1), "rank=-1"),
        (lambda: atomo(0, 1), "rank=0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
