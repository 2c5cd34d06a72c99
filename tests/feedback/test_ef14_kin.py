"""The relatives of classic error feedback against the references."""

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
    SIZES,
    START,
    WORKERS,
    B,
    H,
    check,
    close,
    flat,
    loss,
    optimizer,
    per_leaf,
    run,
    tree,
)
from tests.oracles import compress, ef14, iterates, repeated, two_sided

TOP1 = per_leaf(compress.top_k(1))
TOP2 = per_leaf(compress.top_k(2))
SIGN = per_leaf(compress.scaled_sign)
RATES = [0.05] * 7 + [0.02] * 14


def rate(t):
    return RATES[t]


def schedule(t):
    return jnp.where(t < 7, RATES[0], RATES[-1])


def test_classic_error_feedback_in_this_harness():
    """Gradient units, step units and the corrected form, which the other rules refer to."""
    rule = ef.error_feedback(ef.top_k(k=1), axis_name=AXIS)
    check(optimizer(rule), ef14.gradient_units(GRADS, TOP1, START, lambda t: GAMMA), residual="e")
    steps = ef.simulate(optax.chain(optax.sgd(schedule), rule), WORKERS, AXIS)
    close(run(steps).x, iterates(ef14.step_units(GRADS, TOP1, START, rate), 20))


def test_hard_threshold_feedback_keeps_the_residual_below_the_threshold():
    """Sahu et al. (2021): an absolute compressor bounds every entry of the residual at once."""
    rule = ef.error_feedback(ef.threshold(0.8, capacity=1.0), axis_name=AXIS)
    C = compress.hard_threshold(0.8)
    oracle = ef14.gradient_units(GRADS, C, START, lambda t: GAMMA)
    got = check(optimizer(rule), oracle, residual="e")
    residual = flat(got.state[0].residual, 2)
    assert 0.4 < np.max(np.abs(residual)) < 0.8


@pytest.mark.parametrize("compressor", ["top_k", "scaled_sign"])
def test_ef_momentum(compressor):
    made, C = {"top_k": (ef.top_k(k=1), TOP1), "scaled_sign": (ef.scaled_sign(), SIGN)}[compressor]
    rule = ef.ef_momentum(made, 0.7, axis_name=AXIS)
    got = check(optimizer(rule), ef14.ef_momentum(GRADS, C, START, GAMMA, 0.7))
    damped = [s.r for s in _take(ef14.damped(GRADS, C, START, GAMMA, 0.7), 20)]
    close(flat(got.state[0].residual, 2), damped)


def _take(oracle, rounds):
    return [next(oracle) for _ in range(rounds)]


def test_ecq_sgd():
    rule = ef.ecq_sgd(ef.top_k(k=1), 0.5, 0.9, axis_name=AXIS)
    check(optimizer(rule), ef14.ecq_sgd(GRADS, TOP1, START, GAMMA, 0.5, 0.9), residual="h")


@pytest.mark.parametrize("injection, decay", [(0.5, 1.0), (1.0, 0.9)])
def test_ecq_sgd_and_error_feedback_share_their_knobs(injection, decay):
    """Injection alone is the same in both; the two decays differ."""
    rule = ef.error_feedback(ef.top_k(k=1), axis_name=AXIS, injection=injection, decay=decay)
    oracle = ef14.gradient_units(
        GRADS, TOP1, START, lambda t: GAMMA, injection=injection, retention=decay
    )
    got = check(optimizer(rule), oracle, residual="e")
    other = iterates(ef14.ecq_sgd(GRADS, TOP1, START, GAMMA, injection, decay), 20)
    same = np.allclose(got.x, other, atol=1e-12)
    assert same == (decay == 1.0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_dgc(nesterov, masking):
    rule = ef.dgc(ef.top_k(k=7), momentum=0.5, nesterov=nesterov, masking=masking, axis_name=AXIS)
    oracle = two_sided.dgc(GRADS, 7, START, GAMMA, 0.5, nesterov, masking)
    check(optimizer(rule), oracle, momentum="u", residual="v")


def test_dgc_sparse():
    """Top-1 of each leaf: the reference's k counts over the whole vector, so masks are given."""
    rule = ef.dgc(ef.top_k(k=1), momentum=0.5, axis_name=AXIS)
    got = run(optimizer(rule))
    x, u, v = START, np.zeros((3, 7)), np.zeros((3, 7))
    for t in range(20):
        u = 0.5 * u + np.array([g(x) for g in GRADS])
        v = v + u
        sent = np.array([TOP1(vi) for vi in v])
        kept = np.array([TOP1(vi) == 0 for vi in v])
        v, u, x = v * kept, u * kept, x - GAMMA * sent.mean(0)
        close(got.x[t], x)
        close(flat(jax.tree.map(lambda s, t=t: s[t], got.state[0].momentum), 1), u)


def test_dgc_dense_leaves_have_plain_momentum_and_clipping_is_local():
    policy = ef.per_leaf(lambda path, x: ef.identity() if path == "a" else ef.top_k(k=1))
    rule = ef.dgc(policy, momentum=0.5, clip_norm=1.0, axis_name=AXIS)
    got = run(optimizer(rule))
    x, u, v = START, np.zeros((3, 7)), np.zeros((3, 7))
    dense = np.arange(7) < SIZES[0]
    for t in range(20):
        g = np.array([f(x) for f in GRADS])
        g *= np.minimum(1, 1 / np.sqrt(3) / np.linalg.norm(g, axis=1))[:, None]
        u = 0.5 * u + g
        v = v + u
        sent = np.where(dense, v, [TOP1(vi) for vi in v])
        v, u = v - sent, np.where(dense, u, u * (sent == 0))
        x = x - GAMMA * sent.mean(0)
        close(got.x[t], x)


def test_dgc_warmup_falls_from_epoch_to_epoch():
    """Leaves of 3 and 4 entries: every one, then 2 of each, then 1; the memories go on."""
    warm = ef.policies.dgc_warmup(0.25, 3, warmup_epochs=1)
    ratio = ef.policies.dgc_warmup_ratio(0, 0.25, 1)
    assert ratio == 0.5 and warm.codec.starts == (0, 3)
    got = run(optimizer(ef.dgc(warm, momentum=0.5, axis_name=AXIS)))
    x, u, v = START, np.zeros((3, 7)), np.zeros((3, 7))
    for t in range(20):
        C = TOP2 if t < 3 else TOP1
        u = 0.5 * u + np.array([g(x) for g in GRADS])
        v = v + u
        sent = np.array([C(vi) for vi in v])
        v, u, x = v - sent, u * (sent == 0), x - GAMMA * sent.mean(0)
        close(got.x[t], x)


def test_dgc_warmup_of_the_publication():
    kept = [ef.policies.dgc_warmup(0.001, 10, 5).codec.at(t).ratio for t in range(0, 70, 10)]
    expected = [0.3162, 0.1, 0.03162, 0.01, 0.003162, 0.001, 0.001]
    np.testing.assert_allclose(kept, expected, rtol=1e-3)


def test_double_squeeze():
    rule = ef.double_squeeze(ef.top_k(k=2), ef.top_k(k=1), axis_name=AXIS)
    oracle = two_sided.double_squeeze(GRADS, TOP2, TOP1, START, GAMMA)
    check(optimizer(rule), oracle, residual="e", server_residual="E")


@pytest.mark.parametrize("server", ["sign", "identity"])
def test_two_shot_is_double_squeeze_shard_by_shard(server):
    """Leaves of 3 and 4 entries on 3 workers: shards of 1, and of 2 with the last one padded."""
    edges = [1, 2, 3, 5]

    def by_shard(C):
        return lambda x: np.concatenate(
            [C(part) if part.size else part for part in np.split(x, edges)]
        )

    made, C = {
        "sign": (ef.scaled_sign(), by_shard(compress.scaled_sign)),
        "identity": (ef.identity(), compress.identity),
    }[server]
    shot = ef.exchanges.two_shot(ef.top_k(k=1), made)
    rule = ef.error_feedback(shot, axis_name=AXIS)
    oracle = two_sided.double_squeeze(GRADS, by_shard(compress.top_k(1)), C, START, GAMMA)
    got = check(optimizer(rule), oracle, residual="e")
    shards = (
        got.state[0].exchange.codec["b"].residual
    )  # (rounds, workers, 2): worker 2 serves only padding
    if server == "sign":
        assert shards[:, :2].any() and not shards[:, 2].any()
    else:
        assert not shards.any()
    assert shot.codec.traffic((2, 2), jnp.float32, 3) == (3 * 33, made.codec.bits((2,)))


def test_two_shot_shards_are_cut_anew_for_other_workers():
    """Five entries: shards of 2, 2, 1 on three workers become 3 and 2 on two; none is lost."""
    tx = ef.compressed_mean(ef.exchanges.two_shot(ef.scaled_sign()), axis_name=AXIS)
    three, two = ef.simulate(tx, 3, AXIS), ef.simulate(tx, 2, AXIS)
    params = jnp.zeros(5)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    _, state = jax.jit(three.update)(grads, three.init(params), params)
    E = state.exchange.codec.residual
    assert E.shape == (3, 2) and E[2, 1] == 0 and np.count_nonzero(E) == 5
    after = ef.parallel.change_workers(state, two.init(params)).exchange.codec.residual
    assert after.shape == (2, 3)
    np.testing.assert_array_equal(after.reshape(-1)[:5], E.reshape(-1)[:5])


@pytest.mark.parametrize("nesterov", [False, True])
def test_dist_ef_sgdm(nesterov):
    rule = ef.dist_ef_sgdm(
        ef.scaled_sign(), schedule, momentum=0.5, nesterov=nesterov, axis_name=AXIS
    )
    lifted = ef.simulate(optax.chain(rule, optax.sgd(schedule)), WORKERS, AXIS)
    oracle = two_sided.dist_ef_sgdm(GRADS, SIGN, SIGN, START, rate, 0.5, nesterov)
    got = run(lifted)
    # The rates travel in float32, so that their ratio is good to 1e-7.
    np.testing.assert_allclose(got.x, iterates(oracle, 20), rtol=1e-6, atol=1e-6)


def test_dist_ef_sgdm_at_a_rate_of_zero_waits():
    rule = ef.dist_ef_sgdm(ef.top_k(k=1), lambda t: jnp.where(t == 1, 0.0, 0.5), momentum=0.0)
    params, g = jnp.zeros(2), jnp.array([3.0, 2.0])
    update = jax.jit(rule.update)
    _, first = update(g, rule.init(params), params)
    updates, second = update(g, first, params)
    assert not updates.any() and (second.residual == first.residual).all()
    assert second.last_rate == 0.5


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_scalecom(beta):
    rule = ef.scalecom(k=1, beta=beta, axis_name=AXIS)
    got = run(optimizer(rule))
    # The reference selects over the whole vector: run it leaf by leaf, on the same gradients.
    x, m = START, np.zeros((3, 7))
    edges = np.cumsum([0, *SIZES])
    for t in range(20):
        g = np.array([f(x) for f in GRADS])
        sent = np.zeros((3, 7))
        for low, high in zip(edges, edges[1:], strict=False):
            leader = low + np.argmax(np.abs((m + g)[t % 3, low:high]))
            sent[:, leader] = (m + g)[:, leader]
        m, x = m + beta * (g - sent), x - GAMMA * sent.mean(0)
        close(got.x[t], x)
    close(flat(jax.tree.map(lambda s: s[-1], got.state[0].residual), 1), m)


def test_fcc_of_top_k_is_a_larger_top_k():
    rule = ef.error_feedback(ef.fcc(ef.top_k(k=1), 2), axis_name=AXIS)
    oracle = ef14.gradient_units(GRADS, TOP2, START, lambda t: GAMMA)
    check(optimizer(rule), oracle, residual="e")
    x = np.random.default_rng(5).normal(size=9)
    for R in (1, 3):
        compressor = ef.fcc(ef.scaled_sign(), R)
        got, _ = compressor.update(jnp.asarray(x, jnp.float32), compressor.init(None))
        np.testing.assert_allclose(got, repeated.fcc(compress.scaled_sign, x, R), atol=1e-6)
    assert ef.fcc(ef.top_k(k=2), 3).bits((16,)) == 3 * ef.top_k(k=2).bits((16,))
    assert ef.fcc(ef.top_k(k=4), 2).codec.alpha((16,)) == 1 - (3 / 4) ** 2


def test_fcc_draws_anew_in_every_round():
    compressor = ef.fcc(ef.random_k(key=0, k=4), 2)
    out, _ = jax.jit(compressor.update)(jnp.ones(64), compressor.init(None))
    assert int((out != 0).sum()) > 4


def test_adacomp():
    """One leaf of 3 in bins of 2 and 1, one of 4 in two bins."""
    got = run(optimizer(ef.adacomp(2, axis_name=AXIS)))
    x, r = START, np.zeros((3, 7))
    bins = [[0, 1], [2], [3, 4], [5, 6]]
    for t in range(20):
        sent = np.zeros((3, 7))
        for i, grad in enumerate(GRADS):
            dW = grad(x)
            G, H = r[i] + dW, r[i] + 2 * dW
            gmax = [np.max(np.abs(G[b])) for b in bins]
            for leaf in (0, 2):
                for b, top in zip(bins[leaf : leaf + 2], gmax[leaf : leaf + 2], strict=True):
                    keep = np.abs(H[b]) >= top
                    sent[i, b] = np.where(keep, np.sign(G[b]) * np.mean(gmax[leaf : leaf + 2]), 0)
            r[i] = G - sent[i]
        x = x - GAMMA * sent.mean(0)
        close(got.x[t], x)
    close(flat(jax.tree.map(lambda s: s[-1], got.state[0].residual), 1), r)


def test_safe_ef():
    """Stays at the boundary of ``sum(x) >= 1``, of which every worker knows a different share."""
    shares = np.array([0.5, 1.0, 1.5])

    def constraint(x):
        return 1.0 - np.sum(x)

    tx = optax.chain(
        ef.safe_ef(ef.top_k(k=1), axis_name=AXIS), optax.sgd(GAMMA), ef.ef21_p(ef.top_k(k=2))
    )
    with jax.enable_x64(True):
        params = tree(jnp.asarray(START))
        examples = {"constraint": 0.0, "constraint_grads": params}
        lifted = ef.simulate(tx, WORKERS, AXIS, extra_args=examples)
        state, update = lifted.init(params), jax.jit(lifted.update)
        oracle = repeated.safe_ef(
            GRADS,
            constraint,
            [lambda x, s=s: -s * np.ones(7) for s in shares],
            TOP1,
            TOP2,
            START,
            GAMMA,
        )
        held = []
        for _ in range(20):
            x = np.asarray(flat(params))
            updates, state = update(
                tree(jnp.asarray([g(x) for g in GRADS])),
                state,
                params,
                constraint=ef.PerWorker(jnp.asarray(shares * constraint(x))),
                constraint_grads=ef.PerWorker(tree(jnp.asarray(-shares[:, None] * np.ones(7)))),
            )
            params = optax.apply_updates(params, updates)
            close(flat(params), next(oracle).x)
            held.append(bool(state[0].safe))
    assert any(held) and not all(held)


def test_neolithic():
    """Two minibatches a step, accumulated beforehand; both directions compressed twice."""
    R, noise = 2, np.random.default_rng(1).normal(size=(20, WORKERS, 2, 7))
    rule = ef.neolithic(ef.scaled_sign(), R, ef.top_k(k=1), axis_name=AXIS)
    lifted = optimizer(rule)

    def term(params, batch):  # a minibatch shifts the linear part; both rows are one accumulation
        return loss(params, {"H": batch["H"], "b": batch["b"]})

    with jax.enable_x64(True):
        value_and_grad = ef.worker_value_and_grad(term, WORKERS, AXIS, accumulate=R)

        @jax.jit
        def step(params, state, batch):
            _, grads = value_and_grad(params, batch)
            updates, state = lifted.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, got = tree(jnp.asarray(START)), []
        state = lifted.init(params)
        for t in range(20):
            rows = {"H": np.repeat(H, R, axis=0), "b": (B[:, None] - noise[t]).reshape(-1, 7)}
            params, state = step(params, state, jax.tree.map(jnp.asarray, rows))
            got.append(flat(params))
    noisy = [lambda x, t, r, i=i: GRADS[i](x) + noise[t, i, r] for i in range(WORKERS)]
    by_leaf = [per_leaf(lambda v: repeated.fcc(compress.scaled_sign, v, R)), TOP2]
    x, expected = START, []
    for t in range(20):
        means = [np.mean([g(x, t, r) for r in range(R)], axis=0) for g in noisy]
        x = x - GAMMA * by_leaf[1](np.mean([by_leaf[0](g) for g in means], axis=0))
        expected.append(x)
    close(got, expected)
    close(iterates(repeated.neolithic(noisy, SIGN, TOP1, START, GAMMA, R), 20), expected)


# ---------------------------------------------------------------------------- local steps


def test_qsparse_local_sgd():
    tx = ef.local.qsparse_local_sgd(ef.top_k(k=1), GAMMA, 3, axis_name=AXIS)
    got = run(ef.simulate(tx, WORKERS, AXIS))
    steps = _take(repeated.qsparse_local_sgd(GRADS, TOP1, START, GAMMA, 3), 20)
    close(got.x, [s.x for s in steps])
    close(flat(got.state.residual, 2), [s.m for s in steps])
    close(got.x[:, None] + flat(got.state.ahead, 2), [s.y for s in steps])


def test_qsparse_with_a_schedule_of_the_rate():
    tx = ef.local.qsparse_local_sgd(ef.top_k(k=1), schedule, 1, axis_name=AXIS)
    got = run(ef.simulate(tx, WORKERS, AXIS)).x
    close(got, iterates(ef14.step_units(GRADS, TOP1, START, rate), 20))


# ---------------------------------------------------------------------------- CSER


def test_cser():
    lifted = ef.simulate(
        ef.local.cser(ef.top_k(k=2), ef.top_k(k=1), GAMMA, 3, axis_name=AXIS), WORKERS, AXIS
    )
    got = run(lifted)
    e = flat(got.state.ahead, 2)
    expected = _take(repeated.cser(GRADS, TOP2, TOP1, START, GAMMA, 3), 20)
    close(e, [s.e for s in expected])
    close(got.x[:, None] + e, [s.x_i for s in expected])


def test_cser_without_gradients_is_local_sgd():
    lifted = ef.simulate(
        ef.local.cser(ef.identity(), None, GAMMA, 4, axis_name=AXIS), WORKERS, AXIS
    )
    got = run(lifted)
    models = np.array([START] * 3)
    for t in range(20):
        models = models - GAMMA * np.array([g(m) for g, m in zip(GRADS, models, strict=True)])
        if t % 4 == 3:
            models[:] = models.mean(0)
        close(got.x[t] + flat(jax.tree.map(lambda s, t=t: s[t], got.state.ahead), 1), models)


def test_cser_without_gradients_skips_a_bad_step():
    lifted = ef.simulate(ef.local.cser(ef.identity(), None, 0.1, 4, axis_name=AXIS), 2, AXIS)
    params = jnp.zeros(2)
    fresh = lifted.init(params)
    bad = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    updates, state = lifted.update(bad, fresh, params, grads={"params": bad, "cser": bad})
    assert not updates.any() and not state.ahead.any() and int(state.gradients.skipped) == 1


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ef.ef_momentum(ef.top_k(0.1), 1.0), ValueError, "beta=1.0"),
        (lambda: ef.ecq_sgd(ef.top_k(0.1), -1.0, 0.9), ValueError, "alpha=-1.0"),
        (lambda: ef.ecq_sgd(ef.top_k(0.1), 1.0, 1.1), ValueError, "beta=1.1"),
        (lambda: ef.dgc(ef.top_k(0.1), momentum=-0.1), ValueError, "momentum=-0.1"),
        (lambda: ef.dgc(ef.top_k(0.1), clip_norm=0.0), ValueError, "clip_norm=0.0"),
        (lambda: ef.policies.dgc_warmup_ratio(-1, 0.1, 5), ValueError, "epoch=-1"),
        (lambda: ef.double_squeeze(ef.top_k(0.1), optax.sgd(0.1)), TypeError, "server="),
        (lambda: ef.dist_ef_sgdm(ef.top_k(0.1), 0.1, momentum=1.0), ValueError, "momentum=1.0"),
        (
            lambda: ef.exchanges.two_shot(ef.exchanges.majority_vote()),
            TypeError,
            "encoded by one worker alone",
        ),
        (lambda: ef.adacomp(0), ValueError, "bin_size=0"),
        (
            lambda: ef.safe_ef(ef.top_k(0.1)).update(
                jnp.ones(1), ef.safe_ef(ef.top_k(0.1)).init(jnp.ones(1))
            ),
            ValueError,
            "constraint",
        ),
        (lambda: ef.local.qsparse_local_sgd(ef.top_k(0.1), 0.1, 0), ValueError, "period=0"),
        (lambda: ef.neolithic(ef.top_k(0.1), 0), ValueError, "rounds=0"),
        (lambda: ef.neolithic(ef.power_sgd(2), 2), TypeError, "single leaves"),
        (lambda: ef.policies.dgc_warmup(0.1, 0), ValueError, "steps_per_epoch=0"),
        (lambda: ef.scalecom(0.1, beta=0.0), ValueError, "beta=0.0"),
        (lambda: ef.scalecom(), ValueError, "exactly one"),
        (lambda: ef.fcc(ef.top_k(0.1), 0), ValueError, "rounds=0"),
        (lambda: ef.fcc(ef.dense(optax.clip(1.0)), 2), TypeError, "single leaves"),
        (lambda: ef.local.cser(ef.identity(), None, 0.1, 0), ValueError, "period=0"),
        (
            lambda: ef.local.cser(ef.identity(), None, 0.1, 1).update(
                jnp.ones(1), ef.local.cser(ef.identity(), None, 0.1, 1).init(jnp.ones(1))
            ),
            ValueError,
            "query_points",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
