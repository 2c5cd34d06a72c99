"""Nothing is lost: what was sent plus the residual is the input, for every codec and shape."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.compressors.pool import CASES

STEPS, WORKERS = 3, 2
LEAVES = {
    "scalar": ((), jnp.float32),
    "empty": ((0, 3), jnp.float32),
    "odd": ((7,), jnp.bfloat16),
    "conv": ((3, 2, 2, 2), jnp.float16),
    "matrix": ((5, 4), jnp.float32),
    "none": None,
}


def tree_of(make):
    """The tree of all leaves, ``make(shape, dtype)`` each; one of them is None."""
    return {name: leaf and make(*leaf) for name, leaf in LEAVES.items()}


@functools.cache
def compiled(name: str):
    rule = ef.error_feedback(CASES[name].make(), axis_name="w", update_dtype=jnp.float32)
    tx = ef.simulate(rule, WORKERS, "w")
    params = tree_of(jnp.zeros)

    def run(grads):
        def step(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), grads)

    return jax.jit(run)


def draw(seed: int, exponent: int, kind: str):
    """Gradients of every step and worker."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        x = rng.standard_normal((STEPS, WORKERS, *shape)) * 2.0**exponent
        if kind == "sparse":
            x = x * (rng.random(x.shape) < 0.2)
        elif kind == "ties":
            x = np.sign(x) * 2.0**exponent
        elif kind == "steady":
            x = np.broadcast_to(x[:1], x.shape)
        return jnp.asarray(x, dtype)

    return tree_of(leaf)


# The residual of every codec is that of its message: tests/compressors/test_codecs.py. Here it is
# carried over from step to step, which asks a codec for no more than its kind.
QUICK = {"top_k", "scaled_sign", "qsgd"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
        if case.settles
    ],
)
@hypothesis.settings(max_examples=10)
@hypothesis.given(
    seed=st.integers(0, 2**16),
    exponent=st.sampled_from([-8, 0, 5]),
    kind=st.sampled_from(["normal", "sparse", "ties", "steady"]),
)
def test_sent_plus_residual_is_what_came_in(name: str, seed: int, exponent: int, kind: str) -> None:
    grads = draw(seed, exponent, kind)
    state, updates = compiled(name)(grads)
    for leaf in grads:
        if grads[leaf] is None or grads[leaf].size == 0:
            continue
        came = np.asarray(grads[leaf], np.float64).mean(1).sum(0)
        sent = np.asarray(updates[leaf], np.float64)
        left = np.asarray(state.residual[leaf], np.float64)
        # Each worker rounds its own numbers: residuals may cancel, rounding errors do not.
        size = sum(np.abs(x).max() for x in (np.asarray(grads[leaf], np.float64), sent, left))
        if left.shape != came.shape:  # the identity has no residual, on any worker
            left = left.mean(0)
        error = np.abs(sent.sum(0) + left - came).max()
        assert error <= 4e-6 * size, (leaf, error, size)


def test_decay_gives_away_exactly_its_share() -> None:
    """With retention b the residual is sum_t b^(T-t) of what each step dropped."""
    b = 0.75
    tx = ef.error_feedback(ef.top_k(k=1), decay=b)
    state, update, kept = tx.init(jnp.zeros(3)), jax.jit(tx.update), np.zeros(3)
    for t in range(4):
        g = np.float32([1.0, -2.0, 0.5]) * np.float32(t + 1)
        updates, state = update(g, state)
        kept = b * (kept + np.asarray(g) - np.asarray(updates))
        np.testing.assert_allclose(state.residual, kept, rtol=1e-6)


def test_injection_keeps_the_mass() -> None:
    tx = ef.error_feedback(ef.top_k(k=1), injection=0.5)
    state, update = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    sent, came = np.zeros(3), np.zeros(3)
    for t in range(5):
        g = np.float32([1.0, -2.0, 0.5]) * np.float32(t + 1)
        updates, state = update(g, state)
        sent, came = sent + np.asarray(updates), came + np.asarray(g)
        np.testing.assert_allclose(sent + np.asarray(state.residual), came, rtol=1e-6)


def test_virtual_iterate_moves_by_the_mean_gradient() -> None:
    """In step units, x - mean e moves by exactly lr times the mean gradient (float64)."""
    with jax.enable_x64(True):
        n, d, rate = 3, 6, 0.1
        chain = optax.chain(optax.sgd(rate), ef.error_feedback(ef.scaled_sign(), axis_name="w"))
        tx = ef.simulate(chain, n, "w")
        x = np.linspace(-1.0, 1.0, d)
        state = tx.init(x)
        rng = np.random.default_rng(0)
        for _ in range(10):
            grads = rng.standard_normal((n, d))
            before = x + np.asarray(state[1].residual).mean(0)
            updates, state = tx.update(grads, state, x)
            x = x + np.asarray(updates)
            after = x + np.asarray(state[1].residual).mean(0)
            np.testing.assert_allclose(after, before - rate * grads.mean(0), rtol=0, atol=1e-14)
