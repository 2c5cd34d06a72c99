"""GradiVeQ against its definition in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax.compressors.low_rank.gradiveq import gradiveq

WORKERS, SAMPLES, PERIOD, START = 3, 4, 6, 2


def gradients(shape, steps: int, seed: int = 0) -> np.ndarray:
    """Correlated values: a few directions shared by all slices, plus noise."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    return (
        (
            rng.standard_normal((steps, WORKERS, 3)) @ rng.standard_normal((3, size))
            + 1
            + 0.1 * rng.standard_normal((steps, WORKERS, size))
        )
        .reshape(steps, WORKERS, *shape)
        .astype(np.float32)
    )


def reference(gs: np.ndarray, length: int, dimension: int, reuse: int):
    """Error feedback around GradiVeQ, slice by slice: outputs and memories."""
    steps, workers, size = gs.shape
    count = -(-size // length)
    memory = np.zeros((workers, count * length))
    kept: dict[int, list[np.ndarray]] = {}
    for t in range(steps):
        x = memory + np.pad(gs[t], ((0, 0), (0, count * length - size)))
        out, sent = x.mean(0), x.copy()
        if t >= START:
            place = (t - START) % PERIOD
            for m in range(count):
                own = slice(m * length, (m + 1) * length)
                first = slice(m // reuse * reuse * length, (m // reuse * reuse + 1) * length)
                if place < SAMPLES:
                    kept[m] = (kept.get(m, []) if place else []) + [x[:, first].mean(0)]
                    continue
                mu = np.mean(kept[m], axis=0)
                values, vectors = np.linalg.eigh(np.cov(np.asarray(kept[m]).T))
                U = vectors[:, np.argsort(-values)[:dimension]]
                sent[:, own] = (x[:, own] - mu) @ U @ U.T + mu
            out = sent.mean(0)
        memory = x - sent
        yield out[:size], memory[:, :size]


@pytest.mark.parametrize(
    ("shape", "options", "length", "dimension", "reuse"),
    [
        # one compressor for the leaf
        pytest.param((2, 3, 3, 4), {}, 12, 2, 6, marks=pytest.mark.slow),
        ((2, 3, 3, 4), {"reuse": 4}, 12, 2, 4),  # groups of 4 and 2 slices
        ((50,), {"slice_size": 12, "reuse": 1}, 12, 2, 1),  # the last slice is padded
    ],
)
def test_gradiveq_between_workers(shape, options, length, dimension, reuse) -> None:
    """Two periods: dense, sampling, compressed, sampling again, compressed again."""
    compressor = gradiveq(0.16, samples=SAMPLES, period=PERIOD, start_step=START, **options)
    tx = ef.simulate(ef.error_feedback(compressor, axis_name="w"), WORKERS, "w")
    params = jnp.zeros(shape)
    state, update = tx.init(params), jax.jit(tx.update)
    gs = gradients(shape, START + 2 * PERIOD)
    wanted = reference(gs.reshape(*gs.shape[:2], -1), length, dimension, reuse)
    lossy = 0
    for g, (out, memory) in zip(gs, wanted, strict=True):
        got, state = update(jnp.asarray(g), state, params)
        np.testing.assert_allclose(np.reshape(got, -1), out, atol=1e-3)
        np.testing.assert_allclose(np.reshape(state.residual, (WORKERS, -1)), memory, atol=1e-3)
        lossy += np.abs(memory).max() > 1e-3
    assert lossy == 2 * (PERIOD - SAMPLES)
    assert update._cache_size() == 1


def test_what_the_samples_span_is_exact() -> None:
    """Gradients of rank d about a mean: nothing is lost, not even in slices never sampled."""
    rng = np.random.default_rng(1)
    directions, mean = rng.standard_normal((2, 12)), rng.standard_normal(12)
    draw = lambda: jnp.asarray(  # noqa: E731
        (rng.standard_normal((6, 2)) @ directions + mean).reshape(6, 3, 4), jnp.float32
    )
    compressor = gradiveq(2 / 12, samples=5, period=9)
    state, update = compressor.init(draw()), jax.jit(compressor.update)
    for _ in range(9):
        g = draw()
        out, state = update(g, state)
        np.testing.assert_allclose(out, g, atol=1e-4)


def test_weights_count() -> None:
    """The aggregate is the weighted mean of what was sent, also for weights other than one."""
    compressor = gradiveq(0.25, samples=2, period=4)
    exchange = ef.extend.Exchange(compressor.codec, "w")
    gs = gradients((2, 2, 3, 4), 3, seed=5)

    def run(gs: jax.Array, weight: jax.Array):
        state = exchange.init(gs[0])
        for g in gs[:2]:
            state = exchange(g, state).state
        out = exchange(gs[2], state, weight=weight, want=("sent",))
        return out.aggregate, out.sent

    weights = np.float32([0.5, 0.0, 2.0])
    mean, sent = jax.jit(jax.vmap(run, axis_name="w"))(np.moveaxis(np.asarray(gs), 1, 0), weights)
    expected = np.tensordot(weights, np.asarray(sent), 1) / WORKERS
    np.testing.assert_allclose(mean[0], expected, atol=1e-5)


def test_bytes_of_each_phase(mesh4) -> None:
    """Dense in one branch, d numbers a slice and one word in the other."""
    shape = (3, 3, 4, 8)
    compressor = gradiveq(1 / 8, samples=10, period=50)
    tx = ef.data_parallel(ef.error_feedback(compressor, axis_name="data"), mesh4, "data")
    params = jnp.zeros(shape)
    lowered = jax.jit(tx.update).lower(jnp.zeros((4, *shape)), tx.init(params), params)
    report = ef.wire_report(lowered.compile())
    assert all(c.conditional and c.kind == "reduce" for c in report.collectives)
    flags = 2 * 4  # whether all is finite, one in each branch
    bits = [compressor.codec.at(step).bits(shape) for step in (0, 10)]
    assert bits == [32 * 288, 32 * (9 * 4 + 1)]
    assert 8 * (report.message_bytes - flags) == sum(bits)


def test_which_leaves_are_dense() -> None:
    codec = gradiveq(0.25, samples=100).codec
    assert (
        codec.plan((64, 64)) is None and codec.plan((7,)) is None and codec.plan((0, 3, 3)) is None
    )
    assert codec.plan((3, 3, 16, 8)) == (9, 128, 32, 1, 9)
    assert gradiveq(0.9, samples=10).codec.plan((3, 16, 8)).dimension == 10  # no more than samples
    assert gradiveq(0.5, slice_size=4).codec.plan((7,)) == (2, 4, 2, 1, 2)
    assert gradiveq(0.9, slice_size=4).codec.plan((7,)) is None  # would not shrink


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"samples": 0}, "samples=0"),
        ({"period": 100}, "period=100"),
        ({"slice_size": 0}, "slice_size=0"),
        ({"reuse": -1}, "reuse=-1"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_bad_arguments(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradiveq(**{"ratio": 0.125, **options})


def test_a_leaf_smaller_than_a_slice_is_one_slice() -> None:
    """Two samples span their difference: values on that line are recovered exactly."""
    compressor = ef.gradiveq(0.5, samples=2, period=3, slice_size=8)
    first, second = np.float32([[1.0, 2.0, 0.0, -1.0, 1.0], [0.0, 1.0, 1.0, 2.0, 1.0]])
    state, update = compressor.init(first), jax.jit(compressor.update)
    for x in (first, second, 3 * first - 2 * second):
        out, state = update(x, state)
        np.testing.assert_allclose(out, x, atol=1e-5)
    codec = compressor.codec.at(2)
    assert codec.bits((5,)) == 32 * (2 + 1), "d = min(samples, ceil(K/2)) coordinates, one weight"
