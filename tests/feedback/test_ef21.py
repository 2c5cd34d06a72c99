"""EF21 and its extensions against the references, and against one another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax.feedback.ef21_normalised import normalise
from tests.feedback.problem import (
    AXIS,
    GAMMA,
    GRADS,
    NOISY,
    START,
    WORKERS,
    H,
    check,
    close,
    flat,
    optimizer,
    per_leaf,
    run,
    tree,
)
from tests.oracles import compress, ef21, iterates

TOP1 = per_leaf(compress.top_k(1))
TOP2 = per_leaf(compress.top_k(2))
SIGN = per_leaf(compress.scaled_sign)
WEIGHTS = (0.25, 0.25, 0.5)  # n w_i is exact in float32


@pytest.mark.parametrize("init", ["compressed", "full", "zero"])
def test_ef21(init):
    rule = ef.ef21(ef.top_k(k=1), axis_name=AXIS, init=init)
    oracle = ef21.ef21(GRADS, TOP1, START, GAMMA, init=init)
    check(optimizer(rule), oracle, estimate="g_i", mean="g")


def test_ef21_with_scaled_sign():
    rule = ef.ef21(ef.scaled_sign(), axis_name=AXIS)
    check(optimizer(rule), ef21.ef21(GRADS, SIGN, START, GAMMA), estimate="g_i", mean="g")


@pytest.mark.parametrize("init", ["compressed", "full"])
def test_ef21_plus(init):
    rule = ef.ef21_plus(ef.top_k(k=1), axis_name=AXIS, init=init)
    got = check(
        optimizer(rule), ef21.ef21_plus(GRADS, TOP1, START, GAMMA, init=init), estimate="g_i"
    )
    # The mean is kept through the rounds in which some worker forgot its estimate.
    close(flat(got.state[0].mean, 1), np.mean(flat(got.state[0].estimate, 2), axis=1))


def test_ef21_plus_keeps_its_estimate_if_both_messages_are_equally_near():
    """From (0, 1, 1) to (3, 1, 0): both (3, 0, 0) and (3, 1, 1) are at distance 1."""
    tx = ef.ef21_plus(ef.top_k(k=1), init="full")
    params = jnp.zeros(3)
    _, state = tx.update(jnp.array([0.0, 1.0, 1.0]), tx.init(params), params)
    updates, _ = tx.update(jnp.array([3.0, 1.0, 0.0]), state, params)
    assert updates.tolist() == [3.0, 1.0, 1.0]


def test_ef21_plus_forgets_and_still_agrees():
    """From a far start every worker forgets at least once: the reference says when."""
    steps = ef21.ef21_plus(GRADS, TOP2, 50 * START, 0.2, init="full")
    rule = ef.ef21_plus(ef.top_k(k=2), axis_name=AXIS, init="full")
    got = run(optimizer(rule, 0.2), 12, 50 * START)
    expected = [next(steps) for _ in range(12)]
    np.testing.assert_allclose(got.x, [s.x for s in expected], rtol=1e-11, atol=1e-11)
    plain = iterates(ef21.ef21(GRADS, TOP2, 50 * START, 0.2, init="full"), 12)
    assert np.max(np.abs(got.x - plain)) > 1e-3


def test_ef21_heavy_ball():
    rule = ef.ef21_heavy_ball(ef.top_k(k=1), 0.5, axis_name=AXIS)
    check(optimizer(rule), ef21.heavy_ball(GRADS, TOP1, START, GAMMA, 0.5))


def test_ef21_bidirectional():
    rule = ef.ef21_bidirectional(ef.top_k(k=1), ef.top_k(k=2), axis_name=AXIS)
    oracle = ef21.bidirectional(GRADS, TOP1, TOP2, START, GAMMA)
    check(optimizer(rule), oracle, estimate="gw", broadcast="g")


@pytest.mark.parametrize("probability", [0.5, (0.2, 0.9, 0.5)])
def test_ef21_partial_participation(probability):
    rule = ef.ef21_partial_participation(ef.top_k(k=1), probability, 7, axis_name=AXIS)
    lifted = optimizer(rule)
    got = run(lifted)
    present = np.asarray(got.state[0].present) == 1
    assert present[0].all() and 0 < present.mean() < 1 and len(np.unique(present, axis=0)) > 2
    oracle = ef21.partial_participation(GRADS, TOP1, START, GAMMA, lambda t: present[t])
    check(lifted, oracle, got=got, estimate="g_i")


def test_ef21_w_with_a_compressor_that_is_not_homogeneous():
    class PowerOfTwo(ef.extend.Codec):
        @property
        def traits(self):
            return ef.extend.Traits(homogeneous=False)

        def encode(self, x, key=None):
            with jax.numpy_dtype_promotion("standard"):
                two = jnp.exp2(jnp.floor(jnp.log2(jnp.abs(x))))
            return jnp.where(x == 0, 0, jnp.sign(x) * two)

        def decode(self, message, like):
            return message

        def bits(self, shape, dtype=jnp.float32):
            return 32 * int(np.prod(shape))

    C = compress.power_of_two
    rule = ef.ef21_w(ef.Compressor(PowerOfTwo()), WEIGHTS, axis_name=AXIS)
    oracle = ef21.weighted(GRADS, C, START, GAMMA, WEIGHTS)
    got = check(optimizer(rule), oracle, estimate="g_i", mean="g")
    plain = iterates(ef21.ef21(GRADS, C, START, GAMMA), 20)
    assert np.max(np.abs(got.x - plain)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("init", ["compressed", "full"])
def test_ef21_w_is_ef21_for_top_k(init):
    rule = ef.ef21_w(ef.top_k(k=1), WEIGHTS, axis_name=AXIS, init=init)
    check(optimizer(rule), ef21.ef21(GRADS, TOP1, START, GAMMA, init=init), mean="g")


def test_weighted_partial_participation_with_everybody_is_ef21_w():
    rule = ef.ef21_partial_participation(ef.top_k(k=1), 1.0, 0, weights=WEIGHTS, axis_name=AXIS)
    check(optimizer(rule), ef21.weighted(GRADS, TOP1, START, GAMMA, WEIGHTS), estimate="g_i")


def test_ef21_prox():
    tx = ef.ef21_prox(ef.top_k(k=1), ef.l1_prox(0.5), GAMMA, axis_name=AXIS)
    prox = compress.soft_threshold(0.5 * GAMMA)
    check(ef.simulate(tx, WORKERS, AXIS), ef21.proximal(GRADS, TOP1, prox, START, GAMMA))


def test_ef21_momentum():
    rule = ef.ef21_momentum(ef.top_k(k=1), 0.3, axis_name=AXIS)
    check(optimizer(rule), ef21.momentum(GRADS, TOP1, START, GAMMA, 0.3), estimate="g_i")
    rule = ef.ef21_momentum(ef.top_k(k=1), 0.3, axis_name=AXIS, init="full")
    check(optimizer(rule), ef21.momentum(GRADS, TOP1, START, GAMMA, 0.3, start="full"))


def test_ef21_double_momentum():
    rule = ef.ef21_double_momentum(ef.top_k(k=1), 0.3, axis_name=AXIS)
    check(optimizer(rule), ef21.double_momentum(GRADS, TOP1, START, GAMMA, 0.3), estimate="g_i")


def test_normalised_ef21_momentum_with_schedules():
    """The parameter-agnostic form is a composition with falling fresh weight and step."""

    def falling(scale, power):
        return lambda t: scale * (jnp.asarray(t, jnp.float64) + 1) ** -power

    def reference(scale, power):
        return lambda t: scale * (t + 1.0) ** -power

    tx = optax.chain(
        ef.ef21_momentum(ef.top_k(k=1), falling(1.0, 0.5), axis_name=AXIS),
        optax.normalize_by_update_norm(eps=0.0),
        optax.scale_by_learning_rate(falling(0.1, 0.7)),
    )
    oracle = ef21.normalised(GRADS, TOP1, START, reference(0.1, 0.7), reference(1.0, 0.5))
    check(ef.simulate(tx, WORKERS, AXIS), oracle)


@pytest.mark.parametrize(
    "estimator",
    ["sgdm", "mvr", *(pytest.param(e, marks=pytest.mark.slow) for e in ("igt", "hm", "rhm"))],
)
def test_normalised_forms_are_the_estimators_and_a_normalisation(estimator):
    """Per leaf, as the authors' code: each of the two leaves moves by exactly the step."""
    rate = ef.power_decay(0.1, 0.7)
    key = 3 if estimator == "rhm" else None
    rule = ef.ef21_normalised(ef.top_k(k=1), estimator, 0.25, key=key, axis_name=AXIS)
    tx = ef.simulate(optax.chain(rule, optax.sgd(rate)), WORKERS, AXIS)
    got = run(tx, noisy=True).x
    x, expected, ahead = START, [], 0.75 / 0.25
    v = [g(x, 0) for g in NOISY]
    g_i = [TOP1(vi) for vi in v]
    for t in range(1, 21):
        parts = np.split(np.mean(g_i, axis=0), [3])
        unit = np.concatenate([p / np.linalg.norm(p) for p in parts])
        last, x = x, x - 0.1 * t**-0.7 * unit
        expected.append(x)
        for i, grad in enumerate(NOISY):
            new = grad(x + ahead * (x - last) if estimator == "igt" else x, t)
            if estimator == "mvr":
                v[i] = v[i] + new - grad(last, t)
            elif estimator in ("hm", "rhm"):
                v[i] = v[i] + H[i] @ (x - last)
            v[i] = 0.75 * v[i] + 0.25 * new
            g_i[i] = g_i[i] + TOP1(v[i] - g_i[i])
    close(got, expected)


def test_clip21():
    rule = ef.clip21(0.8, axis_name=AXIS)
    check(optimizer(rule), ef21.clip21(GRADS, compress.clip(0.8), START, GAMMA), estimate="g_i")


# ---------------------------------------------------------------------------- edges of the graph

GRADIENT_DESCENT = {
    "ef21": lambda: ef.ef21(ef.identity(), axis_name=AXIS),
    "ef21 full": lambda: ef.ef21(ef.identity(), axis_name=AXIS, init="full"),
    "ef21 plus": lambda: ef.ef21_plus(ef.identity(), axis_name=AXIS, init="full"),
    "econtrol": lambda: ef.econtrol(ef.identity(), 0.3, axis_name=AXIS, init="full"),
    "ef-bv": lambda: ef.ef_bv(ef.identity(), 0.3, axis_name=AXIS),
}


@pytest.mark.parametrize("name", GRADIENT_DESCENT)
def test_the_identity_takes_exactly_the_gradient_step(name):
    """-lr g, once: with one worker in float32, bit for bit."""
    rule = GRADIENT_DESCENT[name]()
    lifted = ef.simulate(optax.chain(rule, optax.sgd(0.1)), 1, AXIS)
    params, g = tree(jnp.asarray(START, jnp.float32)), tree(jnp.asarray(START[::-1], jnp.float32))
    state = lifted.init(params)
    updates, _ = lifted.update(jax.tree.map(lambda x: x[None], g), state, params)
    for u, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(g), strict=True):
        np.testing.assert_array_equal(u, np.float32(-0.1) * expected)


def test_a_bad_step_changes_nothing():
    """NaN on one worker: the update is zero, all memories stay, and the start is still to come."""
    rule = ef.ef21(ef.top_k(k=1), axis_name=AXIS, init="full")
    lifted = optimizer(rule)
    params = tree(jnp.asarray(START, jnp.float32))
    grads = jax.tree.map(lambda x: jnp.stack([x] * WORKERS), params)
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), grads)
    fresh = lifted.init(params)
    updates, state = lifted.update(bad, fresh, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert int(state[0].exchange.skipped) == 1 and int(state[0].exchange.step) == 0
    memories = (jax.tree.leaves(x[0].estimate) for x in (fresh, state))
    for before, after in zip(*memories, strict=True):
        np.testing.assert_array_equal(before, after)
    updates, _ = lifted.update(grads, state, params)
    np.testing.assert_allclose(flat(updates), -GAMMA * flat(params), rtol=1e-6)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ef.ef21(ef.top_k(0.1), init="dense"), ValueError, "init='dense'"),
        (lambda: ef.ef21(optax.sgd(0.1)), TypeError, "not a Compressor"),
        (lambda: ef.ef21(ef.exchanges.majority_vote()), ValueError, "not give the mean"),
        (
            lambda: ef.ef21(ef.per_leaf(lambda path, x: ef.exchanges.majority_vote())).init(
                jnp.ones(2)
            ),
            ValueError,
            "not give the mean",
        ),
        (lambda: ef.ef21_plus(ef.random_k(0.1, 0)), ValueError, "RandomK is randomised"),
        (lambda: ef.ef21_momentum(ef.top_k(0.1), 0.0), ValueError, "fresh_weight=0.0"),
        (lambda: ef.ef21_heavy_ball(ef.top_k(0.1), 1.0), ValueError, "decay=1.0"),
        (lambda: ef.ef21_w(ef.top_k(0.1), (0.5, 0.6)), ValueError, "sum to 1"),
        (lambda: ef.ef21_partial_participation(ef.top_k(0.1), 0.0, 0), ValueError, "probability"),
        (lambda: ef.ef21_partial_participation(ef.top_k(0.1), 0.5, None), TypeError, "key"),
        (lambda: ef.l1_prox(-1.0), ValueError, "strength"),
        (lambda: ef.clip21(0.0), ValueError, "threshold"),
        (lambda: ef.econtrol(ef.top_k(0.1), -0.1), ValueError, "strength"),
        (lambda: ef.ef_bv(ef.top_k(0.1), 2.0), ValueError, "lam"),
        (lambda: ef.diana(ef.top_k(0.1), 0.0), ValueError, "rate"),
        (
            lambda: ef.ef21_w(ef.top_k(0.1), (0.5, 0.5)).update(
                jnp.ones(2), ef.ef21(ef.top_k(0.1)).init(jnp.ones(2))
            ),
            ValueError,
            "weights has 2 numbers",
        ),
        (
            lambda: ef.proximal(ef.l1_prox(0.1), 0.1).update(jnp.ones(1), optax.EmptyState()),
            ValueError,
            "params=None",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("per_leaf", [True, False])
@pytest.mark.parametrize(
    ("dtype", "factor"), [("float32", 1e-30), ("float32", 1e30), ("float16", 1e4), ("float16", 0)]
)
def test_norm_one_at_any_scale(dtype: str, factor: float, per_leaf: bool) -> None:
    """Squares of a dtype's numbers may leave its range; only zero stays zero."""
    updates = {"a": jnp.array([3.0, 4.0], dtype) * jnp.asarray(factor, dtype), "none": None}
    got, _ = normalise(per_leaf=per_leaf).update(updates, optax.EmptyState())
    expected = np.array([0.6, 0.8]) * bool(factor)
    np.testing.assert_allclose(np.asarray(got["a"], np.float64), expected, rtol=1e-3)
