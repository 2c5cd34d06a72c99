"""The graph of equivalences between the algorithms, edge by edge, on the library's side.

An edge says that a rule with certain options *is* another algorithm. Each is compared with the
NumPy reference of that other algorithm, in float64 to 1e-12 over 40 rounds of three workers that
differ; ``docs/equivalences.md`` lists all edges and where each is tested.
"""

from __future__ import annotations

import re

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
    START,
    WORKERS,
    close,
    flat,
    optimizer,
    per_leaf,
    run,
)
from tests.oracles import compress, difference, ef14, ef21, iterates
from tests.paths import ROOT

ROUNDS = 40
TOP1 = per_leaf(compress.top_k(1))
KEEP = np.array([True, False, True, False, True, True, False])
MASK = compress.mask(KEEP)
TOP, EXACT = ef.top_k(k=1), ef.identity()
RANDOM = ef.random_k(key=9, k=2, scaled=True)


def masked(updates, params=None):
    """A fixed mask of the seven coordinates: additive, homogeneous, deterministic."""
    del params
    rows = iter((KEEP[:3], KEEP[3:].reshape(2, 2)))
    return jax.tree.map(lambda x: jnp.where(next(rows), x, 0), updates)


FIXED = ef.dense(optax.stateless(masked))


def descent(gamma=GAMMA):
    return ef14.plain(GRADS, compress.identity, START, gamma)


def classic(C=TOP1):
    return ef14.gradient_units(GRADS, C, START, lambda t: GAMMA)


def modern(C=TOP1, **options):
    return ef21.ef21(GRADS, C, START, GAMMA, **options)


def whole(tx):
    """A transformation that is an optimizer already."""
    return ef.simulate(tx, WORKERS, AXIS)


def primal():
    exact = ef.compressed_mean(EXACT, axis_name=AXIS)
    return whole(optax.chain(exact, optax.sgd(GAMMA), ef.ef21_p(TOP)))


def mean_worker(C):
    """EF14 in step units of one worker that has the mean gradient."""
    mean = [lambda x: np.mean([g(x) for g in GRADS], axis=0)]
    return ef14.step_units(mean, C, START, lambda t: GAMMA)


EDGES = {
    # -- gradient descent
    "EF14(C = I) = SGD": (
        lambda: optimizer(ef.error_feedback(EXACT, axis_name=AXIS)),
        descent,
    ),
    "EF21(C = I) = GD": (lambda: optimizer(ef.ef21(EXACT, axis_name=AXIS)), descent),
    "EControl(C = I, dense start) = GD": (
        lambda: optimizer(ef.econtrol(EXACT, 0.3, axis_name=AXIS, init="full")),
        descent,
    ),
    "CSER(C1 = I, C2 = 0, H = 1) = SGD": (
        lambda: whole(ef.local.cser(EXACT, None, GAMMA, 1, axis_name=AXIS)),
        descent,
    ),
    "DGC(ratio 1, masking) = SGD": (
        lambda: optimizer(ef.dgc(ef.top_k(1.0), momentum=0.5, axis_name=AXIS)),
        descent,
    ),
    "DGC(ratio 1, masking, Nesterov) = SGD with rate (1 + m) lr": (
        lambda: optimizer(ef.dgc(ef.top_k(1.0), momentum=0.5, nesterov=True, axis_name=AXIS)),
        lambda: descent(1.5 * GAMMA),
    ),
    "DGC(ratio 1, no masking) = heavy ball": (
        lambda: optimizer(ef.dgc(ef.top_k(1.0), momentum=0.5, masking=False, axis_name=AXIS)),
        lambda: ef21.heavy_ball(GRADS, compress.identity, START, GAMMA, 0.5),
    ),
    "MARINA(Q = I) = GD": (
        lambda: optimizer(ef.marina(EXACT, 0.3, key=2, axis_name=AXIS)),
        descent,
    ),
    # -- classic error feedback
    "U1 = U2 at a constant rate": (
        lambda: whole(optax.chain(optax.sgd(GAMMA), ef.error_feedback(TOP, axis_name=AXIS))),
        classic,
    ),
    "DGC(m = 0) = EF14 U1": (
        lambda: optimizer(ef.dgc(TOP, momentum=0.0, axis_name=AXIS)),
        classic,
    ),
    "DoubleSqueeze(server I) = EF14 U1": (
        lambda: optimizer(ef.double_squeeze(TOP, EXACT, axis_name=AXIS)),
        classic,
    ),
    "dist-EF-SGDM(mu = 0, server I) = EF14 U1": (
        lambda: optimizer(ef.dist_ef_sgdm(TOP, GAMMA, momentum=0.0, server=EXACT, axis_name=AXIS)),
        classic,
    ),
    "ef_momentum(0) = EF14 U1": (
        lambda: optimizer(ef.ef_momentum(TOP, 0.0, axis_name=AXIS)),
        classic,
    ),
    "momentum_feedback(0) = EF14 U1": (
        lambda: optimizer(ef.momentum_feedback(TOP, 0.0, axis_name=AXIS)),
        classic,
    ),
    "ECQ-SGD(1, 1) = EF14 U1": (
        lambda: optimizer(ef.ecq_sgd(TOP, 1.0, 1.0, axis_name=AXIS)),
        classic,
    ),
    "Qsparse-local-SGD(H = 1) = EF14 U2": (
        lambda: whole(ef.local.qsparse_local_sgd(TOP, GAMMA, 1, axis_name=AXIS)),
        classic,
    ),
    "EF14 U1 with FCC_2(top-1) = EF14 U1 with top-2": (
        lambda: optimizer(ef.error_feedback(ef.fcc(TOP, 2), axis_name=AXIS)),
        lambda: classic(per_leaf(compress.top_k(2))),
    ),
    "EF21-P(exact gradient): w = EF14 U2": (primal, lambda: mean_worker(TOP1)),
    "EF21 = EF14 for a fixed mask": (
        lambda: optimizer(ef.ef21(FIXED, axis_name=AXIS)),
        lambda: classic(MASK),
    ),
    # -- EF21
    "EF21 = EF-BV(1, 1)": (lambda: optimizer(ef.ef_bv(TOP, 1.0, 1.0, axis_name=AXIS)), modern),
    "EF21 = 3PC with h + C(x - h)": (
        lambda: optimizer(ef.three_point_compressor("ef21", TOP, axis_name=AXIS)),
        modern,
    ),
    "EF21 = CLAG(0)": (
        lambda: optimizer(ef.three_point_compressor("clag", TOP, zeta=0.0, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-BC(C_M = I)": (
        lambda: optimizer(ef.ef21_bidirectional(TOP, EXACT, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-PP(all)": (
        lambda: optimizer(ef.ef21_partial_participation(TOP, 1.0, 0, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-HB(0)": (lambda: optimizer(ef.ef21_heavy_ball(TOP, 0.0, axis_name=AXIS)), modern),
    "EF21 = EF21-SGDM(fresh 1)": (
        lambda: optimizer(ef.ef21_momentum(TOP, 1.0, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-SGD2M(fresh 1)": (
        lambda: optimizer(ef.ef21_double_momentum(TOP, 1.0, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-Prox(r = 0)": (
        lambda: whole(ef.ef21_prox(TOP, ef.l1_prox(0.0), GAMMA, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-W(w = 1/n)": (
        lambda: optimizer(ef.ef21_w(TOP, (1 / 3,) * 3, axis_name=AXIS)),
        modern,
    ),
    "EF21 = EF21-W for homogeneous C": (
        lambda: optimizer(ef.ef21_w(TOP, (0.25, 0.25, 0.5), axis_name=AXIS)),
        modern,
    ),
    "EF21 = EControl(0)": (lambda: optimizer(ef.econtrol(TOP, 0.0, axis_name=AXIS)), modern),
    "EF21 = MVR(fresh 1) + EF21": (
        lambda: optimizer(optax.chain(ef.estimators.storm(1.0), ef.ef21(TOP, axis_name=AXIS))),
        modern,
    ),
    "EF21-W-PP(all) = EF21-W": (
        lambda: optimizer(
            ef.ef21_partial_participation(TOP, 1.0, 0, weights=(0.25, 0.25, 0.5), axis_name=AXIS)
        ),
        lambda: ef21.weighted(GRADS, TOP1, START, GAMMA, (0.25, 0.25, 0.5)),
    ),
    # -- three points
    "CLAG(C = I) = LAG": (
        lambda: optimizer(
            ef.three_point_compressor("clag", EXACT, zeta=8.0, axis_name=AXIS, init="full")
        ),
        lambda: difference.three_point(
            GRADS, difference.rule_lag(8.0), START, GAMMA, compress.identity
        ),
    ),
}


# Edges at which a rule takes another path, or one of the other algorithms ends. At the rest, a rule
# that has an oracle of its own is given numbers that do nothing.
QUICK = {
    "DGC(ratio 1, masking) = SGD",
    "DGC(ratio 1, no masking) = heavy ball",
    "DGC(m = 0) = EF14 U1",
    "EF14 U1 with FCC_2(top-1) = EF14 U1 with top-2",
    "EF14(C = I) = SGD",
    "EF21 = EControl(0)",
    "EF21 = EF14 for a fixed mask",
    "EF21 = EF21-PP(all)",
    "EF21 = EF21-W for homogeneous C",
    "EF21 = MVR(fresh 1) + EF21",
    "EF21-P(exact gradient): w = EF14 U2",
    "CLAG(C = I) = LAG",
    "Qsparse-local-SGD(H = 1) = EF14 U2",
    "U1 = U2 at a constant rate",
    "dist-EF-SGDM(mu = 0, server I) = EF14 U1",
}


@pytest.mark.parametrize(
    "edge", [pytest.param(e, marks=() if e in QUICK else pytest.mark.slow) for e in EDGES]
)
def test_edge(edge):
    made, other = EDGES[edge]
    close(run(made(), ROUNDS).x, iterates(other(), ROUNDS))


def test_edge_page_with_certainty():
    """EF21 = EF21-PAGE(p = 1), with the full start of both."""
    lifted = optimizer(ef.ef21_page(TOP, axis_name=AXIS))
    got = run(lifted, ROUNDS, extra=lambda t: {"exact": True})
    close(got.x, iterates(modern(init="full"), ROUNDS))


def test_edge_corrected_units():
    """U2 = U3 under a falling rate; powers of two, so that the ratio is exact in float32."""
    rates = [0.0625] * 13 + [0.015625] * 40

    def schedule(t):
        return jnp.where(t < 13, rates[0], rates[-1])

    rule = ef.error_feedback(TOP, axis_name=AXIS, learning_rate=schedule)
    lifted = whole(optax.chain(rule, optax.sgd(schedule)))
    steps = ef14.step_units(GRADS, TOP1, START, lambda t: rates[t])
    close(run(lifted, ROUNDS).x, iterates(steps, ROUNDS))


def test_edge_diana():
    """EF-BV(1/(1 + omega), 1) = DIANA: the same draws, the same iterates and control variates."""
    one = run(optimizer(ef.diana(RANDOM, 0.4, axis_name=AXIS)), ROUNDS)
    other = run(optimizer(ef.ef_bv(RANDOM, 0.4, 1.0, axis_name=AXIS)), ROUNDS)
    close(one.x, other.x)
    close(flat(one.state[0].control, 2), flat(other.state[0].control, 2))


def test_edge_scalecom_of_one_worker():
    """ScaleCom(beta = 1, n = 1) = EF14 U1."""
    params = {"a": jnp.zeros(5)}
    one, other = ef.scalecom(k=2), ef.error_feedback(ef.top_k(k=2))
    states = one.init(params), other.init(params)
    updates = jax.jit(one.update), jax.jit(other.update)
    for t in range(10):
        g = {"a": np.random.default_rng(t).normal(size=5).astype(np.float32)}
        a, b = (update(g, state) for update, state in zip(updates, states, strict=True))
        np.testing.assert_allclose(a[0]["a"], b[0]["a"], rtol=1e-6)
        states = a[1], b[1]


def test_edge_power_sgd_memories():
    """Subtracting the common output or the worker's own part: equal outputs and mean memory."""
    with jax.enable_x64(True):
        params, rng = jnp.zeros((4, 3)), np.random.default_rng(0)
        lifted = [
            ef.simulate(
                ef.error_feedback(ef.power_sgd(1, local_error=local), axis_name=AXIS), 3, AXIS
            )
            for local in (False, True)
        ]
        states = [tx.init(params) for tx in lifted]
        for _ in range(6):
            g = jnp.asarray(rng.normal(size=(3, 4, 3)))
            out = [tx.update(g, state, params) for tx, state in zip(lifted, states, strict=True)]
            states = [state for _, state in out]
            np.testing.assert_allclose(out[0][0], out[1][0], rtol=1e-10, atol=1e-10)
            one, other = (np.asarray(s.residual) for s in states)
            np.testing.assert_allclose(one.mean(0), other.mean(0), rtol=1e-10, atol=1e-10)
    assert np.max(np.abs(one - other)) > 0.1


def test_top_k_separates_what_a_mask_joins():
    """EF21 and EF14 differ for top-k: the edge above is not a coincidence of the problem."""
    got = run(optimizer(ef.ef21(TOP, axis_name=AXIS)), ROUNDS).x
    assert np.max(np.abs(got - iterates(classic(), ROUNDS))) > 1e-3


def test_virtual_iterate_of_double_squeeze():
    """``x - gamma (E + mean e_i)`` moves by the exact mean gradient."""
    got = run(optimizer(ef.double_squeeze(ef.top_k(k=2), TOP, axis_name=AXIS)), ROUNDS)
    left = flat(got.state[0].server_residual, 1) + flat(got.state[0].residual, 2).mean(1)
    virtual = np.concatenate([START[None], got.x - GAMMA * left])
    x = np.concatenate([START[None], got.x[:-1]])
    mean = np.array([np.mean([g(p) for g in GRADS], axis=0) for p in x])
    close(virtual[1:], virtual[:-1] - GAMMA * mean)


def test_the_page_of_equivalences_is_complete_and_true():
    root = ROOT
    text = (root / "docs" / "equivalences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `(.+?)::(\w+)` \|$", text, re.MULTILINE)
    for edge, path, function in rows:
        assert f"def {function}(" in (root / path).read_text(encoding="utf-8"), edge
    listed = {edge for edge, _, function in rows if function == "test_edge"}
    assert listed == set(EDGES)
