"""EF-BV, DIANA, EControl, 3PC, MARINA, EF21-P and gradient estimators against the references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
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
    recorded,
    replayed,
    run,
)
from tests.oracles import compress, difference, estimators, iterates

TOP1 = per_leaf(compress.top_k(1))
TOP2 = per_leaf(compress.top_k(2))
SIGN = per_leaf(compress.scaled_sign)


def test_ef_bv():
    rule = ef.ef_bv(ef.top_k(k=1), 0.5, 0.8, axis_name=AXIS)
    oracle = difference.ef_bv(GRADS, [TOP1] * 3, START, GAMMA, 0.5, 0.8)
    check(optimizer(rule), oracle, control="h_i")


RANDOM2 = ef.random_k(key=7, k=2, scaled=True)


def test_diana():
    lifted = optimizer(ef.diana(recorded(RANDOM2), 0.4, axis_name=AXIS))
    got = run(lifted)
    masks = flat(got.state[0].exchange.codec, 2)
    assert (masks.sum(-1) == 4).all() and len(np.unique(masks.reshape(-1, 7), axis=0)) > 5
    oracle = difference.diana(GRADS, replayed(masks, 2), START, GAMMA, 0.4)
    check(lifted, oracle, got=got, mean="h", control="h_i")


def test_diana_learns_at_the_rate_of_its_compressor():
    """omega = 3/1 - 1 and 4/1 - 1 on the two leaves, so that a (d/k) = 1 there."""
    rule = ef.diana(ef.random_k(key=3, k=1, scaled=True), axis_name=AXIS)
    h = flat(run(optimizer(rule), 1).state[0].control, 2)[0]
    g = np.array([f(START) for f in GRADS])
    assert (np.count_nonzero(h[:, :3], axis=1) == 1).all()
    np.testing.assert_allclose(h, np.where(h != 0, g, 0), rtol=1e-12)


@pytest.mark.slow
def test_diana_converges_where_plain_compression_cannot():
    """If workers disagree but gradients are exact, control variates remove all the noise."""
    compressor = ef.random_k(key=3, k=2, scaled=True)
    best = np.linalg.solve(H.mean(0), -np.mean([g(np.zeros(7)) for g in GRADS], axis=0))
    end = {}
    for name, rule in {
        "diana": ef.diana(compressor, 0.4, axis_name=AXIS),
        "plain": ef.compressed_mean(compressor, axis_name=AXIS),
    }.items():
        end[name] = np.linalg.norm(run(optimizer(rule, 0.03), 1500).x[-1] - best)
    assert end["diana"] < 1e-6 and end["plain"] > 1e-3


def test_diana_needs_omega():
    tx = ef.diana(ef.wangni(0.3, 0))  # unbiased, of unknown variance
    with pytest.raises(ValueError, match="no known variance omega"):
        jax.eval_shape(tx.update, np.ones(3, np.float32), tx.init(np.ones(3, np.float32)))


def test_diana_asks_for_the_variance_among_all_workers():
    """perm-k of one worker is exact, of three it has variance 2: a = 1/3."""
    rule = ef.diana(ef.exchanges.perm_k(0), axis_name=AXIS)
    h = flat(run(optimizer(rule), 1).state[0].control, 2)[0]
    g = np.array([f(START) for f in GRADS])
    np.testing.assert_allclose(h[h != 0], g[h != 0], rtol=1e-7)  # 3 g / 3


@pytest.mark.parametrize("init, start", [("compressed", "zero"), ("full", "dense")])
def test_econtrol(init, start):
    rule = ef.econtrol(ef.top_k(k=1), 0.2, axis_name=AXIS, init=init)
    oracle = difference.econtrol(GRADS, TOP1, START, GAMMA, 0.2, start=start)
    check(optimizer(rule), oracle, estimate="h_i", residual="e_i")


# ---------------------------------------------------------------------------- three points

THREE_POINT = {
    "ef21": (dict(), difference.rule_ef21(TOP1)),
    "clag": (dict(zeta=8.0), difference.rule_clag(TOP1, 8.0)),
    "v2": (dict(second=ef.scaled_sign()), difference.rule_v2(TOP1, SIGN)),
    "v3": (
        dict(second=ef.top_k(k=2), zeta=8.0),
        difference.rule_v3(TOP1, difference.rule_clag(TOP2, 8.0)),
    ),
    "v4": (dict(second=ef.top_k(k=2)), difference.rule_v4(TOP1, TOP2)),
}


@pytest.mark.parametrize("variant", THREE_POINT)
def test_three_point_compressors(variant):
    options, reference = THREE_POINT[variant]
    rule = ef.three_point_compressor(variant, ef.top_k(k=1), axis_name=AXIS, **options)
    oracle = difference.three_point(GRADS, reference, START, GAMMA, TOP1)
    got = check(optimizer(rule), oracle, estimate="g_i")
    if variant in ("clag", "v3"):
        assert 0 < got.state[0].sent.mean() < 1  # the trigger both fires and holds back


def test_v1_starts_from_the_full_gradients():
    identity = compress.identity
    rule = ef.three_point_compressor("v1", ef.top_k(k=1), axis_name=AXIS, init="full")
    oracle = difference.three_point(GRADS, difference.rule_v1(TOP1), START, GAMMA, identity)
    check(optimizer(rule), oracle, estimate="g_i")


def test_v5_with_its_own_coin():
    rule = ef.three_point_compressor(
        "v5", ef.top_k(k=1), probability=0.3, key=1, axis_name=AXIS, init="full"
    )
    got = run(optimizer(rule))
    # A round was exact where every estimate is the gradient itself.
    estimate = flat(got.state[0].estimate, 2)
    exact = [bool(np.all(estimate[t] == flat(got.state[0].last, 2)[t])) for t in range(20)]
    assert 2 <= sum(exact) <= 12 and exact[0]
    coins = iter([c for c in exact[1:] for _ in GRADS])
    reference = difference.rule_v5(TOP1, lambda: next(coins))
    oracle = difference.three_point(GRADS, reference, START, GAMMA, compress.identity)
    close(got.x, iterates(oracle, 20))


# ---------------------------------------------------------------------------- query points


def test_marina_takes_both_gradients_on_the_same_minibatch():
    lifted = optimizer(ef.marina(recorded(RANDOM2), 0.3, key=2, axis_name=AXIS))
    got = run(lifted, noisy=True)
    state = got.state[0]
    exact, masks = state.exact, flat(state.exchange.codec, 2)
    assert exact[0] and 2 <= exact.sum() <= 12 and (state.present == 1).all()
    Q = replayed(masks[~exact], 2)
    oracle = difference.marina(NOISY, Q, START, GAMMA, lambda t: exact[t])
    check(lifted, oracle, got=got, mean="g")


def test_pp_marina_averages_over_those_that_take_part():
    lifted = optimizer(ef.marina(recorded(RANDOM2), 0.3, key=2, participants=2, axis_name=AXIS))
    got = run(lifted, noisy=True)
    state = got.state[0]
    exact, present = state.exact, state.present == 1
    assert present[exact].all() and (present[~exact].sum(1) == 2).all()
    assert len(np.unique(present[~exact], axis=0)) == 3  # each worker is left out at times
    Q = replayed(flat(state.exchange.codec, 2)[~exact], 2)
    oracle = difference.marina(NOISY, Q, START, GAMMA, lambda t: exact[t], lambda t: present[t])
    check(lifted, oracle, got=got, mean="g")  # the weight 3/2 is exact in float32


@pytest.mark.slow
def test_pp_marina_with_all_workers_is_marina():
    one, other = (
        ef.marina(RANDOM2, 0.3, key=2, participants=r, axis_name=AXIS) for r in (None, WORKERS)
    )
    close(run(optimizer(other), noisy=True).x, run(optimizer(one), noisy=True).x)


@pytest.mark.slow
def test_marina_with_the_identity_is_the_minibatch_recursion():
    """On quadratics, differences between two points have no noise; only exact rounds add it."""
    rule = ef.marina(ef.identity(), 1.0, key=2, axis_name=AXIS)
    x, sgd = START, []
    for t in range(20):
        x = x - GAMMA * np.mean([g(x, t) for g in NOISY], axis=0)
        sgd.append(x)
    close(run(optimizer(rule), noisy=True).x, sgd)


def test_ef21_page():
    rule = ef.ef21_page(ef.top_k(k=1), axis_name=AXIS)

    def coin(t):
        return t % 4 == 0

    lifted = ef.simulate(optax.chain(rule, optax.sgd(GAMMA)), WORKERS, AXIS)
    got = run(lifted, noisy=True, extra=lambda t: {"exact": coin(t)})
    v = [g(START, 0) for g in NOISY]
    g_i, last, x = list(v), START, START
    for t in range(20):
        if t:
            for i, g in enumerate(NOISY):
                v[i] = g(x, t) if coin(t) else v[i] + g(x, t) - g(last, t)
                g_i[i] = g_i[i] + TOP1(v[i] - g_i[i])
        last, x = x, x - GAMMA * np.mean(g_i, axis=0)
        close(got.x[t], x)


ESTIMATORS = {
    "storm": (
        lambda: ef.estimators.storm(0.3),
        lambda: estimators.storm(NOISY, TOP1, START, GAMMA, 0.3),
    ),
    "hessian momentum": (
        lambda: ef.estimators.hessian_momentum(0.3),
        lambda: estimators.hessian_momentum(NOISY, H, TOP1, START, GAMMA, 0.3),
    ),
    "hessian momentum at a random point": (
        lambda: ef.estimators.hessian_momentum(0.3, key=0),
        lambda: estimators.hessian_momentum(NOISY, H, TOP1, START, GAMMA, 0.3),
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ef21_with_a_gradient_estimator(name):
    make, oracle = ESTIMATORS[name]
    rule = optax.chain(make(), ef.ef21(ef.top_k(k=1), axis_name=AXIS))
    lifted = ef.simulate(optax.chain(rule, optax.sgd(GAMMA)), WORKERS, AXIS)
    close(run(lifted, noisy=True).x, iterates(oracle(), 20))


def test_ef21_with_implicit_gradient_transport():
    rule = optax.chain(ef.estimators.igt(0.25), ef.ef21(ef.top_k(k=1), axis_name=AXIS))
    lifted = ef.simulate(optax.chain(rule, optax.sgd(GAMMA)), WORKERS, AXIS)
    close(run(lifted, noisy=True).x, iterates(estimators.igt(NOISY, TOP1, START, GAMMA, 0.25), 20))


def test_ef21_p():
    """The parameters are w; the server's model is w plus what the workers still lack."""
    tx = optax.chain(
        ef.compressed_mean(ef.identity(), axis_name=AXIS),
        optax.sgd(GAMMA),
        ef.ef21_p(ef.top_k(k=1)),
    )
    got = run(ef.simulate(tx, WORKERS, AXIS))
    oracle = difference.ef21_p(GRADS, TOP1, START, GAMMA)
    steps = [next(oracle) for _ in range(20)]
    close(got.x, [s.w for s in steps])
    close(got.x + flat(got.state[2].behind, 1), [s.x for s in steps])


def test_ec_sgd_diana():
    """In step units, with the optimizer between the two parts, as the paper writes it."""
    tx = optax.chain(
        ef.gradient_shift(ef.top_k(k=2), 0.5, axis_name=AXIS),
        optax.sgd(GAMMA),
        ef.error_feedback(ef.top_k(k=1), axis_name=AXIS),
    )
    oracle = difference.ec_sgd_diana(GRADS, TOP1, TOP2, START, GAMMA, 0.5)
    expected = iterates(oracle, 20)
    close(run(ef.simulate(tx, WORKERS, AXIS)).x, expected)
    # The named recipe is in gradient units: equal for a constant rate and a homogeneous C.
    recipe = ef.ec_sgd_diana(ef.top_k(k=1), ef.top_k(k=2), 0.5, axis_name=AXIS)
    close(run(optimizer(recipe)).x, expected)


@pytest.mark.slow
def test_ec_sgd_diana_converges_where_error_feedback_stalls():
    best = np.linalg.solve(H.mean(0), -np.mean([g(np.zeros(7)) for g in GRADS], axis=0))
    end = {}
    for name, rule in {
        "shifted": ef.ec_sgd_diana(ef.top_k(k=1), ef.top_k(k=2), 0.5, axis_name=AXIS),
        "classic": ef.error_feedback(ef.top_k(k=1), axis_name=AXIS),
        "ef21": ef.ef21(ef.top_k(k=1), axis_name=AXIS),
        "econtrol": ef.econtrol(ef.top_k(k=1), 0.1, axis_name=AXIS),
    }.items():
        end[name] = np.linalg.norm(run(optimizer(rule, 0.02), 4000).x[-1] - best)
    assert end["classic"] > 1e-3
    assert max(end[name] for name in ("shifted", "ef21", "econtrol")) < 1e-6


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ef.three_point_compressor("v9", ef.top_k(0.1)), ValueError, "variant='v9'"),
        (lambda: ef.three_point_compressor("clag", ef.top_k(0.1)), ValueError, "needs zeta"),
        (
            lambda: ef.three_point_compressor("ef21", ef.top_k(0.1), zeta=1.0),
            ValueError,
            "does not use zeta",
        ),
        (lambda: ef.three_point_compressor("v2", ef.top_k(0.1)), ValueError, "needs second"),
        (
            lambda: ef.three_point_compressor("clag", ef.top_k(0.1), zeta=-1.0),
            ValueError,
            "zeta=-1.0",
        ),
        (lambda: ef.three_point_compressor("v1", ef.top_k(0.1)), ValueError, 'init="full"'),
        (
            lambda: ef.three_point_compressor("v5", ef.top_k(0.1), probability=0.0, key=0),
            ValueError,
            "probability=0.0",
        ),
        (lambda: ef.marina(ef.identity(), 0.0, 0), ValueError, "probability=0.0"),
        (
            lambda: ef.marina(ef.identity(), 0.5, 0).update(
                jnp.ones(1), ef.marina(ef.identity(), 0.5, 0).init(jnp.ones(1)), jnp.ones(1)
            ),
            ValueError,
            "query_points",
        ),
        (lambda: ef.marina(ef.top_k(0.1), 0.5, 0), ValueError, "TopK is biased"),
        (lambda: ef.diana(ef.top_k(0.1)), ValueError, "TopK is biased.*ef_bv"),
        (lambda: ef.marina(ef.natural(0), 0.5, 0, participants=0), ValueError, "participants=0"),
        (
            lambda: ef.simulate(
                ef.marina(ef.natural(0), 0.5, 0, participants=3, axis_name=AXIS), 2, AXIS
            ).init(jnp.ones(1)),
            ValueError,
            "participants=3 must be at most 2",
        ),
        (lambda: ef.estimators.storm(0.0), ValueError, "fresh_weight=0.0"),
        (lambda: ef.estimators.igt(2.0), ValueError, "fresh_weight=2.0"),
        (lambda: ef.estimators.hessian_momentum(0.5, "key"), TypeError, "random key"),
        (
            lambda: ef.estimators.page().update(
                jnp.ones(1), ef.estimators.page().init(jnp.ones(1))
            ),
            ValueError,
            "params",
        ),
        (lambda: ef.gradient_shift(ef.identity(), 0.0), ValueError, "rate=0.0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
