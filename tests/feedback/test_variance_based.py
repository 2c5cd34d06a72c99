"""Variance-based compression against NumPy, with squares of real samples' gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from tests.conftest import make_mesh

N, BATCH, STEPS = 4, 5, 6
ALPHA, DECAY = 1.5, 0.9
SHAPES = {"a": (3,), "b": (4, 5)}
PARAMS = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def samples(steps: int = STEPS, n: int = N) -> dict[str, np.ndarray]:
    """Gradients of single samples: a different mean for each coordinate, and noise."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape) + rng.normal(size=(steps, n, BATCH, *shape))
        for name, shape in SHAPES.items()
    }


def means_and_squares(drawn: dict[str, np.ndarray], t: int):
    g = {name: jnp.asarray(x[t].mean(1), jnp.float32) for name, x in drawn.items()}
    squares = {
        name: jnp.asarray(((x[t] / BATCH) ** 2).sum(1), jnp.float32) for name, x in drawn.items()
    }
    return g, squares


def oracle(x: np.ndarray, room: int):
    """Emitted updates of each step, the last r and v, and how often something did not fit."""
    r, v, emitted, crowded = np.zeros(x.shape[3:]), np.zeros(x.shape[3:]), [], 0
    r, v = np.stack([r] * x.shape[1]), np.stack([v] * x.shape[1])
    for batch in x:
        r = r + batch.mean(1)
        v = v + np.sum((batch / BATCH) ** 2, axis=1)
        sent = np.zeros_like(r)
        for i in range(len(r)):
            passed = np.flatnonzero(r[i] ** 2 > ALPHA * v[i])
            crowded += passed.size > room
            largest = passed[np.argsort(-np.abs(r[i].ravel()[passed]), kind="stable")][:room]
            sent[i].ravel()[largest] = r[i].ravel()[largest]
            v[i] *= DECAY
            v[i].ravel()[largest] = 0
        r = r - sent
        emitted.append(sent.mean(0))
    return np.stack(emitted), r, v, crowded


def run(lifted, update, drawn):
    state, out = lifted.init(PARAMS), []
    for t in range(STEPS):
        g, squares = means_and_squares(drawn, t)
        updates, state = update(g, state, squares)
        out.append(updates)
    return jax.tree.map(lambda *xs: np.stack(xs), *out), state


def example():
    return {"squares": {k: jnp.zeros(s) for k, s in SHAPES.items()}}


@functools.cache
def lifted_by(how: str, capacity: float):
    """Workers, and their compiled update."""
    tx = ef.variance_based(ALPHA, capacity=capacity, decay=DECAY, axis_name="data")
    if how == "simulate":
        lifted = ef.simulate(tx, N, "data", extra_args=example())
    else:
        lifted = ef.data_parallel(tx, make_mesh((N,), ("data",)), "data", extra_args=example())
    return lifted, jax.jit(lambda g, s, q: lifted.update(g, s, PARAMS, squares=ef.PerWorker(q)))


@pytest.mark.parametrize(
    "how,capacity",
    [
        ("simulate", 0.3),
        pytest.param("simulate", 1.0, marks=pytest.mark.slow),
        pytest.param("devices", 0.3, marks=pytest.mark.slow),
    ],
)
def test_against_numpy(how: str, capacity: float) -> None:
    drawn = samples()
    emitted, state = run(*lifted_by(how, capacity), drawn)
    crowded = 0
    for name, x in drawn.items():
        room = int(np.ceil(capacity * np.prod(SHAPES[name])))
        expected, r, v, crowds = oracle(x, room)
        crowded += crowds
        np.testing.assert_allclose(emitted[name], expected, atol=2e-6)
        np.testing.assert_allclose(state.residual[name], r, atol=2e-6)
        np.testing.assert_allclose(state.variance[name], v, atol=2e-6)
        assert 0 < np.count_nonzero(expected) < expected.size
        # Nothing is lost: emitted updates plus what waits add up to all gradients.
        total = emitted[name].sum(0) + np.asarray(state.residual[name]).mean(0)
        np.testing.assert_allclose(total, x.mean((1, 2)).sum(0), atol=1e-5)
    assert (crowded > 0) == (capacity < 1)


def test_what_finds_no_room_waits() -> None:
    """Three pass but one fits: the others keep their sum, and their variance decays."""
    tx = ef.variance_based(1.0, capacity=0.25, decay=0.5)
    g, squares = jnp.array([3.0, -5.0, 4.0, 1.0]), jnp.array([1.0, 1.0, 1.0, 1.0])
    update = jax.jit(lambda g, squares: tx.update(g, tx.init(jnp.zeros(4)), squares=squares))
    updates, state = update(g, squares)
    assert updates.tolist() == [0, -5, 0, 0]
    assert state.residual.tolist() == [3, 0, 4, 1]  # 1 is not above 1: it is ambiguous
    assert state.variance.tolist() == [0.5, 0, 0.5, 0.5]


def test_one_sample_is_never_unambiguous() -> None:
    """r^2 = v for a batch of one at the first step, and alpha = 1 requires more."""
    tx = ef.variance_based(1.0, capacity=1.0)
    g = jnp.array([3.0, -5.0])
    update = jax.jit(lambda g, state: tx.update(g, state, squares=g * g))
    updates, state = update(g, tx.init(g))
    assert not np.any(updates)
    again, _ = update(g, state)
    assert again.tolist() == [6, -10]


@pytest.mark.parametrize("what", ["gradient", "squares"])
def test_one_bad_number_skips_the_step(what: str) -> None:
    lifted, update = lifted_by("simulate", 1.0)
    g, squares = means_and_squares(samples(1), 0)
    bad = g if what == "gradient" else squares
    bad["a"] = bad["a"].at[2, 1].set(jnp.nan)
    updates, state = update(g, lifted.init(PARAMS), squares)
    assert int(state.exchange.skipped) == 1
    leaves = jax.tree.leaves((updates, state.residual, state.variance))
    assert not any(np.any(x) for x in leaves)


def test_bits_of_the_message_are_those_of_the_program() -> None:
    lifted, update = lifted_by("devices", 0.3)
    g, squares = means_and_squares(samples(1), 0)
    report = ef.wire_report(update.lower(g, lifted.init(PARAMS), squares).compile())
    bits = sum(32 + room * (32 + index) for room, index in ((1, 2), (6, 5)))
    assert report.message_bytes == 4 * (-(-bits // 32) + 2)


def test_bad_arguments_say_what_to_do() -> None:
    for make, message in (
        (lambda: ef.variance_based(0.0, capacity=0.1), "alpha=0.0"),
        (lambda: ef.variance_based(1.0, capacity=0.0), "capacity=0.0"),
        (lambda: ef.variance_based(1.0, capacity=0.1, decay=0.0), "decay=0.0"),
        (lambda: ef.variance_based(1.0, capacity=0.1, decay=1.5), "decay=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    tx, g = ef.variance_based(1.0, capacity=0.5), jnp.ones(3)
    with pytest.raises(ValueError, match=r"squares=None; give.*PerWorker"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match="squares has shapes"):
        tx.update(g, tx.init(g), squares=jnp.ones(4))
