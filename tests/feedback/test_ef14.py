"""EF14 beside its papers: reference iterates, the three units, the schedule that ends at zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

RATE = 0.1
CURVATURE = np.asarray([1.0, 2.0, 3.0])  # f(x) = (x1^2 + 2 x2^2 + 3 x3^2) / 2, x_0 = (1, 1, 1)
STEPPED = np.asarray([0.1, 0.1, 0.05, 0.05])

# Exact iterates x_1, x_2, ..., computed by hand in rational arithmetic.
TOP1 = [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.28), (0.6, 0.6, 0.28)]
SIGN = [
    (0.8, 0.8, 0.8),
    (0.97333333333333333, 0.62666666666666667, 0.62666666666666667),
    (0.73422222222222222, 0.38755555555555556, 0.38755555555555556),
]
STEPPED_U2 = [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.385), (0.7, 0.6, 0.385)]
STEPPED_U1 = [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.49), (0.8, 0.6, 0.49)]
INJECTED = [(1, 1, 0.7), (1, 0.7, 0.7), (1, 0.7, 0.385), (1, 0.44, 0.385)]
RETAINED = [(1, 1, 0.7), (1, 0.62, 0.7), (1, 0.62, 0.301), (0.6561, 0.62, 0.301)]


def schedule(count):
    return jnp.asarray(STEPPED, jnp.float64)[jnp.minimum(count, 3)]


def top1(**options):
    return ef.error_feedback(ef.top_k(k=1), **options)


CASES = {
    "step units, top-1": (lambda: optax.chain(optax.sgd(RATE), top1()), TOP1),
    "gradient units, top-1": (lambda: optax.chain(top1(), optax.sgd(RATE)), TOP1),
    "step units, scaled sign": (
        lambda: optax.chain(optax.sgd(RATE), ef.error_feedback(ef.scaled_sign())),
        SIGN,
    ),
    "step units, stepped rate": (lambda: optax.chain(optax.sgd(schedule), top1()), STEPPED_U2),
    "corrected, stepped rate": (
        lambda: optax.chain(top1(learning_rate=schedule), optax.sgd(schedule)),
        STEPPED_U2,
    ),
    "gradient units, stepped rate": (
        lambda: optax.chain(top1(), optax.sgd(schedule)),
        STEPPED_U1,
    ),
    "injection 0.5": (lambda: optax.chain(top1(injection=0.5), optax.sgd(RATE)), INJECTED),
    "retention 0.9": (lambda: optax.chain(top1(decay=0.9), optax.sgd(RATE)), RETAINED),
}


@pytest.mark.parametrize("case", CASES)
def test_reference_iterates(case: str) -> None:
    make, expected = CASES[case]
    with jax.enable_x64(True):
        tx = make()
        x = np.ones(3)
        state, update = tx.init(x), jax.jit(tx.update)
        for target in expected:
            updates, state = update(np.asarray(CURVATURE) * x, state, x)
            x = x + np.asarray(updates)
            # the corrected form's ratio of rates is kept in float32, exact for these to 1e-7
            tolerance = 2e-7 if case.startswith("corrected") else 1e-12
            np.testing.assert_allclose(x, target, rtol=tolerance)


def test_nothing_is_applied_and_all_is_kept_where_the_rate_is_zero() -> None:
    rates = jnp.asarray([0.5, 0.0, 0.0, 0.25])
    rate = lambda count: rates[count]  # noqa: E731
    tx = ef.error_feedback(ef.top_k(k=1), learning_rate=rate)
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    _, state = update(jnp.asarray([3.0, 2.0]), state)
    for _ in range(2):
        updates, state = update(jnp.asarray([9.0, 9.0]), state)
        assert updates.tolist() == [0.0, 0.0] and state.residual.tolist() == [0.0, 2.0]
    updates, state = update(jnp.asarray([1.0, 0.0]), state)
    assert updates.tolist() == [0.0, 4.0]  # the residual 2 times 0.5 / 0.25
    assert np.isfinite(state.residual).all()


def test_residual_is_float32_for_narrow_gradients_and_updates_keep_their_dtype() -> None:
    params = jnp.zeros(4, jnp.bfloat16)
    g = jnp.asarray([1.0, 2.0, 3.0, 4.0], jnp.bfloat16)
    for options, out in (({}, jnp.bfloat16), ({"update_dtype": jnp.float32}, jnp.float32)):
        tx = ef.error_feedback(ef.top_k(k=2), **options)
        updates, state = jax.eval_shape(tx.update, g, tx.init(params), params)
        assert updates.dtype == out and state.residual.dtype == jnp.float32
    narrow = ef.error_feedback(ef.top_k(k=2), memory=jnp.bfloat16)
    _, state = jax.eval_shape(narrow.update, g, narrow.init(params))
    assert state.residual.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        (lambda: optax.chain(optax.scale(1.0), ef.top_k(0.1)), "compose"),
        (lambda: optax.masked(ef.top_k(0.1), True), "per_leaf"),
        (lambda: optax.inject_hyperparams(ef.top_k, static_args=("ratio",))(ratio=0.1), "per_leaf"),
        (lambda: optax.clip(1.0), "dense"),
        (lambda: ef.top_k(0.1).codec, "Compressor"),
    ],
)
def test_only_a_compressor_compresses(argument, remedy: str) -> None:
    with pytest.raises(TypeError, match=remedy):
        ef.error_feedback(argument())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ef.top_k(), "ratio"),
        (lambda: ef.top_k(0.1, k=3), "exactly one"),
        (lambda: ef.top_k(1.5), "1.5"),
        (lambda: ef.top_k(k=0), "k=0"),
        (lambda: ef.random_k(0.1), "key"),
        (lambda: ef.cast("int8"), "int8"),
        (lambda: ef.error_feedback(ef.sign(), decay=1.5), "decay"),
        (lambda: ef.compose(ef.top_k(0.1), ef.scaled_sign()), "quantizer, sparsifier"),
        (lambda: ef.per_leaf(ef.top_k(0.1)), "policy"),
        (lambda: ef.dense(optax.trace(0.9)), "state"),
        (lambda: ef.simulate(ef.error_feedback(ef.sign(), axis_name="w"), 0, "w"), "num_workers"),
    ],
)
def test_bad_arguments_are_named(make, names: str) -> None:
    with pytest.raises((ValueError, TypeError), match=names):
        make()


def test_ratio_under_inject_hyperparams_must_be_static() -> None:
    def make(ratio, rate):
        return optax.chain(ef.error_feedback(ef.top_k(ratio)), optax.sgd(rate))

    traced = optax.inject_hyperparams(make)(ratio=0.1, rate=0.1)
    with pytest.raises(ValueError, match="static_args"):
        traced.init(jnp.zeros(10))
    static = optax.inject_hyperparams(make, static_args=("ratio",))(ratio=0.1, rate=0.1)
    zeros, g = jnp.zeros(10), np.arange(10, dtype=np.float32)
    updates, _ = jax.jit(static.update)(g, static.init(zeros), zeros)
    assert np.count_nonzero(updates) == 1
