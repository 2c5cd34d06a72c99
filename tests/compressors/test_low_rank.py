"""Low-rank compressors against NumPy, alone and between workers."""

from __future__ import annotations

import importlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._numeric.matrix import orthonormal
from ef_optax.compressors._batches import batches_of
from ef_optax.compressors.low_rank.acp_sgd import acp_sgd
from ef_optax.compressors.low_rank.atomo import atomo
from ef_optax.compressors.low_rank.power_sgd import power_sgd
from ef_optax.compressors.low_rank.svd import svd
from ef_optax.compressors.quantize.two_mean_sign import two_mean_sign
from ef_optax.compressors.sparse.dct_top_k import dct_top_k
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.parallel.simulation import simulate
from tests.compressors.coding import updated

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
    first = np.asarray(compressor.codec.init(jnp.zeros((12, 7)), "", 3), np.float64).T
    for g, (out, memory) in zip(
        gs, reference(first, gs, iterations=iterations, local=local), strict=True
    ):
        sent, state = update(jnp.asarray(g), state, jnp.zeros((12, 7)))
        np.testing.assert_allclose(sent, out, atol=2e-5)
        np.testing.assert_allclose(residual(state), memory, atol=2e-5)


def alternating(p, q, gradients, *, iterations=1, local=True, start=0):
    """ACP-SGD with error feedback from its definition: outputs and memories after each step."""
    memory = np.zeros(gradients.shape[1:], np.float64)
    for t, g in enumerate(gradients.astype(np.float64)):
        m = g + memory
        out = 0
        for half in range(iterations):
            if (t * iterations + half) % 2 == 0:
                q = np.linalg.qr(q)[0]
                mine = m @ q
                p = mine.mean(0)
                own, part = mine @ q.T, p @ q.T
            else:
                p = np.linalg.qr(p)[0]
                mine = m.transpose(0, 2, 1) @ p
                q = mine.mean(0)
                own, part = p @ mine.transpose(0, 2, 1), p @ q.T
            m = m - (own if local else part)
            out = out + part
        memory = m
        yield out, memory


@pytest.mark.parametrize(("iterations", "local"), [(1, True), (2, False), (3, True)])
def test_acp_sgd_between_workers(iterations: int, local: bool) -> None:
    """Left and right factors alternate, also if a step ends on a different side than it began."""
    shape = (12, 7)
    compressor = acp_sgd(2, iterations=iterations, local_error=local)
    tx, state, update = workers(compressor, shape)
    gs = gradients(shape, 4)
    p, q = (np.asarray(f, np.float64) for f in compressor.codec.init(jnp.zeros(shape), "", 3))
    wanted = alternating(p, q.T, gs, iterations=iterations, local=local)
    for g, (out, memory) in zip(gs, wanted, strict=True):
        sent, state = update(jnp.asarray(g), state, jnp.zeros(shape))
        np.testing.assert_allclose(sent, out, atol=3e-5)
        np.testing.assert_allclose(residual(state), memory, atol=3e-5)


def test_acp_sgd_projects_and_is_exact_after_both_sides() -> None:
    """Never longer than the gradient; two steps of one matrix of its rank give that matrix."""
    rng = np.random.default_rng(1)
    m = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 15))
    compressor = acp_sgd(3)
    with jax.enable_x64(True):
        first, state = updated(compressor, jnp.asarray(m), compressor.init(jnp.asarray(m)))
        second, _ = updated(compressor, jnp.asarray(m), state)
        assert 0.1 < np.linalg.norm(first - m) / np.linalg.norm(m) < 1
        np.testing.assert_allclose(second, m, rtol=0, atol=1e-11)


@pytest.mark.parametrize("start_step", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_acp_sgd_sends_one_factor_a_step(start_step: int, mesh4) -> None:
    """One all-reduce a branch: the dense one, the left factor, the right factor."""
    compressor, shape = acp_sgd(2, start_step=start_step), (40, 60)
    tx = ef.data_parallel(ef.error_feedback(compressor, axis_name="data"), mesh4, "data")
    lowered = jax.jit(tx.update).lower(
        jnp.zeros((4, *shape)), tx.init(jnp.zeros(shape)), jnp.zeros(shape)
    )
    report = ef.wire_report(lowered.compile())
    assert {c.kind for c in report.collectives} == {"reduce"}
    assert all(c.conditional for c in report.collectives)
    sizes = sorted(c.message_bytes - 4 for c in report.collectives)  # without the finite flag
    assert sizes == [4 * 80, 4 * 120] + ([4 * 2400] if start_step else [])
    steps = range(start_step, start_step + 2)
    assert sorted(compressor.codec.at(t).bits(shape) for t in steps) == [32 * 80, 32 * 120]


@pytest.mark.parametrize("make", [power_sgd, pytest.param(acp_sgd, marks=pytest.mark.slow)])
def test_equal_matrices_are_one_batch(make) -> None:
    """The same results as each leaf alone, for small ones, large ones and unequal shapes."""
    shapes = {"a": (8, 6), "b": (2, 4, 6), "c": (6, 8), "d": (280, 250), "e": (280, 250), "f": (5,)}
    tree = {k: jnp.asarray(gradients(s, seed=i)[0, 0]) for i, (k, s) in enumerate(shapes.items())}
    compressor = make(2)
    before = compressor.init(tree)

    @jax.jit
    def both(tree):
        own = {k: before._replace(codec=codec) for k, codec in before.codec.items()}
        each = {k: compressor.update(x, own[k]) for k, x in tree.items()}
        return compressor.update(tree, before), each

    (together, after), each = both(tree)
    for k, (alone, state) in each.items():
        np.testing.assert_allclose(together[k], alone, atol=2e-5)
        for a, b in zip(jax.tree.leaves(after.codec[k]), jax.tree.leaves(state.codec), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
    plans = [compressor.codec.plan(x.shape) for x in tree.values()]
    batches, dense = batches_of(list(tree.values()), plans, jnp.int32(0))
    assert [b.members for b in batches] == [(0, 1), (2,), (3, 4)] and dense == [5]
    assert [len(b.parts) for b in batches] == [1, 1, 2]


def test_a_policy_may_make_the_compressor_again_for_each_leaf(monkeypatch) -> None:
    """Compressors that are equal by value still share work: one orthonormalisation."""
    module, calls = importlib.import_module("ef_optax.compressors.low_rank.power_sgd"), []
    monkeypatch.setattr(module, "orthonormal", lambda m: calls.append(m.shape) or orthonormal(m))
    policy = ef.per_leaf(lambda path, leaf: power_sgd(2))
    tree = [jnp.asarray(gradients((8, 6), seed=i)[0, 0]) for i in range(5)]
    updated(policy, tree, policy.init(tree))
    assert calls == [(5, 8, 2)]


BATCHED = {
    "power_sgd": lambda b: power_sgd(2, batch_axes=b),
    "acp_sgd": lambda b: acp_sgd(2, batch_axes=b),
    "svd": lambda b: svd(2, batch_axes=b),
    "dct_top_k": lambda b: dct_top_k(8, 3, batch_axes=b),
    "two_mean_sign": lambda b: two_mean_sign(columns=True, batch_axes=b),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("acp_sgd", "dct_top_k") else ())
        for name in BATCHED
    ],
)
def test_batch_axes(name: str) -> None:
    """Layers stacked for a scan are compressed as each layer alone, in one message."""
    x = jnp.asarray(gradients((4, 3, 9), 2)[:, 0])  # two layers of 12 x 9
    stacked, single = BATCHED[name](1), BATCHED[name](0)
    state = stacked.init(x)
    out, _ = jax.jit(stacked.update)(x, state)
    update = jax.jit(single.update)
    for i in range(2):
        own = state._replace(codec=jax.tree.map(lambda s, i=i: s[i], state.codec))
        np.testing.assert_allclose(out[i], update(x[i], own)[0], atol=1e-5)
    bits = [c.bits(s) for c, s in [(stacked, x.shape), (single, x.shape[1:])]]
    assert bits[0] == 2 * bits[1]
    assert not np.allclose(out, update(x, single.init(x))[0], atol=1e-3)


def test_atomo_draws_for_each_layer() -> None:
    """Unbiased, with an independent draw for each matrix."""
    x, codec = jnp.asarray(gradients((12, 11), 2)[:, 0]), atomo(1, 0, batch_axes=1).codec
    like, keys = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.split(jax.random.key(2), 3000)
    y = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))(keys)
    y = np.asarray(y, np.float64)
    error = y.std(0) / np.sqrt(len(y))
    assert (np.abs(y.mean(0) - x) <= 5.5 * error + 1e-6).all()
    sent = np.linalg.matrix_rank(y, tol=1e-4)  # terms of both layers in each draw
    assert abs(np.corrcoef(sent.T)[0, 1]) < 0.1 and sent.std(0).min() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["zero", "one column", "rank one", "tiny", "huge", "zero column"])
def test_orthonormal_survives(kind: str, dtype: str) -> None:
    """Always a full set of orthonormal columns that spans the matrix, for any rank."""
    rng = np.random.default_rng(3)
    m = rng.standard_normal((30, 4))
    m = {
        "zero": 0 * m,
        "one column": m * [1, 0, 0, 0],
        "rank one": np.outer(m[:, 0], [1, 2, -1, 3]),
        "tiny": m * 1e-30,
        "huge": m * 1e30,
        "zero column": m * [1, 0, 1, 1],
    }[kind]
    m = np.asarray(jnp.asarray(m, dtype).astype(jnp.float32))
    q = np.asarray(orthonormal(jnp.asarray(m)), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-5)
    scale = max(np.abs(m).max(), 1e-38)
    assert np.abs(q @ (q.T @ (m / scale)) - m / scale).max() < 1e-5


@pytest.mark.parametrize("make", [power_sgd, acp_sgd])
def test_a_direction_without_gradient_is_not_lost(make) -> None:
    """After gradients of rank one, a gradient of rank two is approximated at rank two again."""
    rng = np.random.default_rng(4)
    one = jnp.asarray(np.outer(rng.standard_normal(12), rng.standard_normal(9)), jnp.float32)
    two = jnp.asarray(rng.standard_normal((12, 2)) @ rng.standard_normal((2, 9)), jnp.float32)
    compressor = make(2)
    state, update = compressor.init(one), jax.jit(compressor.update)
    for _ in range(4):
        _, state = update(one, state)
    for _ in range(4):
        out, state = update(two, state)
    np.testing.assert_allclose(out, two, atol=1e-3)


@pytest.mark.parametrize("make", [power_sgd, acp_sgd])
def test_directions_outlast_a_step_without_gradient(make) -> None:
    """A gradient that is met again after two zero ones needs no further iteration."""
    rng = np.random.default_rng(4)
    two = jnp.asarray(rng.standard_normal((12, 2)) @ rng.standard_normal((2, 9)), jnp.float32)
    compressor = make(2)
    state, update = compressor.init(two), jax.jit(compressor.update)
    for gradient in (two, two, two, two, jnp.zeros_like(two), jnp.zeros_like(two)):
        _, state = update(gradient, state)
    np.testing.assert_allclose(update(two, state)[0], two, atol=1e-3)


@pytest.mark.parametrize("make", [power_sgd, acp_sgd])
def test_no_constant_for_given_directions(make) -> None:
    """A matrix that the present directions miss is not approximated at all, so alpha is None."""
    compressor = make(1)
    m = jnp.zeros((6, 5)).at[3, 2].set(7.0)
    first = jax.tree.map(lambda f: jnp.eye(*f.shape), compressor.init(m).codec)
    out, _ = updated(compressor, m, compressor.init(m)._replace(codec=first))
    assert compressor.codec.alpha((6, 5)) is None and not np.asarray(out).any()


def test_declared_properties_have_counterexamples() -> None:
    """PowerSGD is homogeneous and deterministic, but neither linear nor unbiased."""
    compressor = power_sgd(1)
    a, b = (jnp.asarray(gradients((6, 5), seed=i)[0, 0]) for i in range(2))
    run = jax.jit(lambda x: compressor.update(x, compressor.init(x))[0])
    np.testing.assert_allclose(run(4 * a), 4 * run(a), rtol=1e-4)
    assert np.array_equal(run(a), run(a))
    assert np.abs(run(a + b) - run(a) - run(b)).max() > 0.1
    assert np.abs(run(a) - a).max() > 0.1
    codec = compressor.codec
    assert codec.homogeneous and codec.deterministic and codec.additive
    assert not codec.linear and not codec.unbiased and codec.omega((6, 5)) is None


def test_power_sgd_error_feedback_identity() -> None:
    """original = returned + residual; a convolution is (height, width, inputs) by outputs."""
    shape = (3, 3, 4, 8)
    tx = error_feedback(power_sgd(2, iterations=3))
    g = np.asarray(gradients(shape)[0, 0])
    out, state = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(out + np.reshape(residual(state), shape), g, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(out).reshape(36, 8), tol=1e-3) == 2
    assert power_sgd(2).codec.traffic(shape, "float32", 4) == (2 * 36 * 32, 2 * 8 * 32)


def test_power_sgd_is_exact_at_its_rank() -> None:
    """rank(M) <= r and one worker: the output is M after one step."""
    rng = np.random.default_rng(1)
    m = (rng.standard_normal((20, 3)) @ rng.standard_normal((3, 15))).astype(np.float32)
    compressor = power_sgd(3)
    out, _ = updated(compressor, jnp.asarray(m), compressor.init(jnp.asarray(m)))
    np.testing.assert_allclose(out, m, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_power_sgd_survives_zeros(dtype: str) -> None:
    """A zero gradient gives zeros, no residual, and keeps the directions for the next one."""
    zero, g = jnp.zeros((10, 8), dtype), jnp.asarray(gradients((10, 8))[0, 0], dtype)
    compressor = power_sgd(2)
    start = compressor.init(zero)
    update = jax.jit(compressor.update)
    out, state = update(zero, start)
    assert out.dtype == zero.dtype and (np.asarray(out, np.float32) == 0).all()
    after, _ = update(g, state)
    direct, _ = update(g, start)
    assert np.array_equal(np.asarray(after, np.float32), np.asarray(direct, np.float32))


def test_small_leaves_are_dense() -> None:
    """Vectors, scalars and leaves that would not shrink enough are averaged without error."""
    compressor = power_sgd(2, min_compression=2)
    g = {"b": jnp.arange(3.0), "s": jnp.asarray(2.0), "w": jnp.ones((4, 6)), "e": jnp.zeros((0, 4))}
    out, state = updated(compressor, g, compressor.init(g))
    assert all(np.array_equal(out[k], g[k]) for k in g)
    assert compressor.bits((4, 6)) == 24 * 32 and compressor.bits((40, 60)) == 200 * 32
    assert not jax.tree.leaves(state.codec)


def test_svd_is_the_best_approximation() -> None:
    m = gradients((9, 14))[0, 0]
    u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    compressor = svd(3)
    out, _ = updated(compressor, jnp.asarray(m), compressor.init(None))
    np.testing.assert_allclose(out, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    assert compressor.codec.alpha((9, 14)) == 1 / 3 and compressor.bits((9, 14)) == 3 * 23 * 32


def test_svd_attains_its_alpha() -> None:
    """Rank r keeps r of the n equal parts of an orthogonal matrix."""
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))[0].astype(np.float32)
    out = np.asarray(updated(svd(2), q, svd(2).init(None))[0])
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
    assert expected <= codec.omega(m.shape) * np.sum(s**2) and codec.omega(m.shape) == 12


def test_atomo_variance_of_equal_singular_values() -> None:
    """For equal singular values omega is the bound minus 1; for others it may be larger."""
    at = lambda s, r: np.sum(s**2 * (1 / np.minimum(1, r * s / s.sum()) - 1)) / np.sum(s**2)  # noqa: E731
    assert at(np.ones(10), 2) == pytest.approx(10 / 2 - 1)
    uneven = np.asarray([3.0] + [1.0] * 9)
    assert 10 / 9 - 1 < at(uneven, 9) <= 10 / 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: power_sgd(0), "rank=0"),
        (lambda: power_sgd(2, iterations=0), "iterations=0"),
        (lambda: power_sgd(2, min_compression=0.5), "min_compression=0.5"),
        (lambda: power_sgd(2, start_step=-1), "start_step=-1"),
        (lambda: acp_sgd(2, start_step=1.5), "acp_sgd: start_step=1.5"),
        (lambda: svd(2, batch_axes=-1), "batch_axes=-1"),
        (lambda: two_mean_sign(batch_axes=True), "batch_axes=True"),
        (lambda: svd(-1), "rank=-1"),
        (lambda: atomo(0, 1), "rank=0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_first_factors_are_drawn_from_each_leaf_s_own_name() -> None:
    """Whatever is drawn beside them, and however long the longest of these is."""
    shapes = {"a": (40, 30), "b": (60, 30), "c": (3, 20, 50), "d": (90, 70), "bias": (30,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    key = jax.random.key(3)
    state = ef.error_feedback(ef.power_sgd(2, key=key)).init(params)
    factors = {"a": (2, 30), "b": (2, 30), "c": (2, 50), "d": (2, 70)}
    for name, shape in factors.items():
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        expected = jax.random.normal(own, shape)
        np.testing.assert_array_equal(state.exchange.codec[name].reshape(-1), expected.reshape(-1))
    assert state.exchange.codec["bias"] == ()
