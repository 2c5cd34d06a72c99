"""The NumPy references against hand-computed iterates, and against one another.

The first part compares each reference with iterates worked out in exact arithmetic; the second is
the graph of equivalences between the algorithms, whose edges the library's own tests repeat.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from ef_optax import theory
from tests.oracles import Step, compress, difference, ef14, ef21, iterates, repeated, run, two_sided

TOLERANCE = 1e-12
ROUNDS = 40
HALVED = [0.1, 0.1, 0.05, 0.05]


def quadratic_1():
    """n = 1, f = (x1^2 + 2 x2^2 + 3 x3^2)/2."""
    return [lambda x: np.array([1.0, 2.0, 3.0]) * x]


def quadratics_3(d: int = 5, seed: int = 0):
    """n = 3 heterogeneous quadratics (1/2) x^T H_i x - b_i^T x."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(d, d)) for _ in range(3)]
    H = [(i + 1) * (A @ A.T / d + 0.1 * np.eye(d)) for i, A in enumerate(factors)]
    b = [rng.normal(size=d) for _ in range(3)]
    return [lambda x, H=Hi, b=bi: H @ x - b for Hi, bi in zip(H, b, strict=True)]


def same(first, second, rounds: int = ROUNDS):
    np.testing.assert_allclose(
        iterates(first, rounds), iterates(second, rounds), rtol=TOLERANCE, atol=TOLERANCE
    )


def differ(first, second, rounds: int = ROUNDS, by: float = 1e-3):
    assert np.max(np.abs(iterates(first, rounds) - iterates(second, rounds))) > by


ONES = np.ones(3)
START = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
TOP1 = compress.top_k(1)
TOP2 = compress.top_k(2)


def constant(value):
    return lambda t: value


def scheduled(values):
    return lambda t: values[t]


# ---------------------------------------------------------------------------- exact iterates

F = 1 / 3
REFERENCE = {
    "ef14 u2 top-1": (
        lambda: ef14.step_units(quadratic_1(), TOP1, ONES, constant(0.1)),
        [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.28), (0.6, 0.6, 0.28)],
    ),
    "ef14 u2 scaled sign": (
        lambda: ef14.step_units(quadratic_1(), compress.scaled_sign, ONES, constant(0.1)),
        [
            (0.8, 0.8, 0.8),
            (0.97 + 0.01 * F, 0.62 + 0.02 * F, 0.62 + 0.02 * F),
            (0.734222222222222, 0.387555555555556, 0.387555555555556),
        ],
    ),
    "ef14 u2 scheduled": (
        lambda: ef14.step_units(quadratic_1(), TOP1, ONES, scheduled(HALVED)),
        [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.385), (0.7, 0.6, 0.385)],
    ),
    "ef14 u3 scheduled": (
        lambda: ef14.lr_corrected(quadratic_1(), TOP1, ONES, scheduled(HALVED)),
        [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.385), (0.7, 0.6, 0.385)],
    ),
    "ef14 u1 scheduled": (
        lambda: ef14.gradient_units(quadratic_1(), TOP1, ONES, scheduled(HALVED)),
        [(1, 1, 0.7), (1, 0.6, 0.7), (1, 0.6, 0.49), (0.8, 0.6, 0.49)],
    ),
    "ef_momentum": (
        lambda: ef14.ef_momentum(quadratic_1(), TOP1, ONES, 0.1, 0.5),
        [(1, 1, 0.85), (1, 1, 0.6475), (1, 0.7, 0.6475), (1, 0.7, 0.352)],
    ),
    "dist-ef-sgdm": (
        lambda: two_sided.dist_ef_sgdm(
            quadratic_1(), compress.scaled_sign, compress.identity, ONES, constant(0.1), 0.5
        ),
        [
            (0.7, 0.7, 0.7),
            (0.97 + 0.01 * F, 0.42 + 0.02 * F, 0.42 + 0.02 * F),
            (0.589111111111111, 0.042444444444444, 0.042444444444444),
        ],
    ),
    "ef21": (
        lambda: ef21.ef21(quadratic_1(), TOP1, ONES, 0.1),
        [(1, 1, 0.7), (1, 0.8, 0.4), (1, 0.6, 0.28), (0.9, 0.4, 0.16)],
    ),
    "ef21-hb": (
        lambda: ef21.heavy_ball(quadratic_1(), TOP1, ONES, 0.1, 0.5),
        [(1, 1, 0.7), (1, 0.8, 0.25), (1, 0.5, -0.05)],
    ),
    "ef21-sgdm": (
        lambda: ef21.momentum(quadratic_1(), TOP1, ONES, 0.1, 0.5),
        [(1, 1, 0.7), (1, 0.8, 0.4), (1, 0.6, 0.2125), (0.9, 0.4, 0.025)],
    ),
    "ef21-sgd2m": (
        lambda: ef21.double_momentum(quadratic_1(), TOP1, ONES, 0.1, 0.5),
        [(1, 1, 0.7), (1, 0.8, 0.4), (0.9, 0.6, 0.1), (0.8, 0.4, -0.070625)],
    ),
    "ef21-prox": (
        lambda: ef21.proximal(quadratic_1(), TOP1, compress.soft_threshold(0.1 * 0.5), ONES, 0.1),
        [(0.95, 0.95, 0.65), (0.9, 0.71, 0.3), (0.85, 0.47, 0.16), (0.8, 0.326, 0.02)],
    ),
    "dgc": (
        lambda: two_sided.dgc(quadratic_1(), 1, ONES, 0.1, 0.5),
        [(1, 1, 0.7), (1, 0.5, 0.7), (1, 0.5, 0.175), (0.3875, 0.5, 0.175)],
    ),
    "dgc without masking": (
        lambda: two_sided.dgc(quadratic_1(), 1, ONES, 0.1, 0.5, masking=False),
        [(1, 1, 0.7), (1, 0.5, 0.7), (1, 0.5, -0.05), (0.3875, 0.5, -0.05)],
    ),
    "dgc nesterov": (
        lambda: two_sided.dgc(quadratic_1(), 1, ONES, 0.1, 0.5, nesterov=True),
        [(1, 1, 0.55), (1, 0.35, 0.55), (1, 0.35, 0.01375), (0.29375, 0.35, 0.01375)],
    ),
    "ef21-p": (
        lambda: difference.ef21_p(quadratic_1(), TOP1, ONES, 0.1),
        [(0.9, 0.8, 0.7), (0.8, 0.6, 0.49), (0.7, 0.48, 0.28), (0.6, 0.36, 0.196)],
    ),
    "injection 1/2": (
        lambda: ef14.gradient_units(quadratic_1(), TOP1, ONES, constant(0.1), injection=0.5),
        [(1, 1, 0.7), (1, 0.7, 0.7), (1, 0.7, 0.385), (1, 0.44, 0.385)],
    ),
    "retention .9": (
        lambda: ef14.gradient_units(quadratic_1(), TOP1, ONES, constant(0.1), retention=0.9),
        [(1, 1, 0.7), (1, 0.62, 0.7), (1, 0.62, 0.301), (0.6561, 0.62, 0.301)],
    ),
    "ecq": (
        lambda: ef14.ecq_sgd(quadratic_1(), TOP1, ONES, 0.1, 0.5, 0.9),
        [(1, 1, 0.7), (1, 0.7, 0.7), (1, 0.7, 0.385), (1, 0.454, 0.385)],
    ),
    "ef-bv": (
        lambda: difference.ef_bv(quadratic_1(), [TOP1], ONES, 0.1, 0.5, 1.0),
        [(1, 1, 0.7), (1, 0.8, 0.55), (0.9, 0.7, 0.4)],
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_iterates(name: str):
    build, expected = REFERENCE[name]
    np.testing.assert_allclose(iterates(build(), len(expected)), expected, rtol=0, atol=1e-13)


def test_reference_memories():
    steps = run(REFERENCE["ef14 u2 top-1"][0](), 4)
    e = [(0.1, 0.2, 0), (0.2, 0, 0.21), (0.3, 0.12, 0), (0, 0.24, 0.084)]
    np.testing.assert_allclose([s.e[0] for s in steps], e, atol=1e-13)
    steps = run(REFERENCE["ef14 u2 scaled sign"][0](), 2)
    e = [(-0.1, 0, 0.1), (0.15 + 0.01 * F, -0.04 * F, 0.16 + 0.02 * F)]
    np.testing.assert_allclose([s.e[0] for s in steps], e, atol=1e-13)
    steps = run(REFERENCE["ef21"][0](), 4)
    g = [(0, 0, 3), (0, 2, 3), (0, 2, 1.2), (1, 2, 1.2)]
    np.testing.assert_allclose([s.g_i[0] for s in steps], g, atol=1e-13)


def test_weighted_by_powers_of_two():
    """Two workers in one dimension with a compressor that is not homogeneous: EF21-W differs."""
    grads = [lambda x: 1.0 * (x - 1.0), lambda x: 3.0 * (x + 1.0)]
    x, C = np.ones(1), compress.power_of_two
    plain = iterates(ef21.ef21(grads, C, x, 0.1), 4)
    weighted = iterates(ef21.weighted(grads, C, x, 0.1, (0.25, 0.75)), 4)
    np.testing.assert_allclose(plain[:, 0], [0.8, 0.55625, 0.3375, 0.15625], atol=1e-13)
    np.testing.assert_allclose(weighted[:, 0], [0.7, 0.45, 0.25, 0.1], atol=1e-13)


def test_clip21_of_a_constant_gradient():
    steps = run(ef21.clip21([lambda x: np.array([5.0])], compress.clip(2.0), np.zeros(1), 1.0), 4)
    assert [s.g_i[0][0] for s in steps] == [2.0, 4.0, 5.0, 5.0]


# ---------------------------------------------------------------------------- EF14 and relatives


def test_ef14_units():
    grads, decay = quadratics_3(), lambda t: 0.05 if t < 20 else 0.01
    identity = iterates(ef14.step_units(grads, compress.identity, START, decay), ROUNDS)
    x, sgd = START, []
    for t in range(ROUNDS):
        x = x - decay(t) * np.mean([g(x) for g in grads], axis=0)
        sgd.append(x)
    np.testing.assert_allclose(identity, sgd, rtol=TOLERANCE, atol=TOLERANCE)
    for C in (TOP1, compress.scaled_sign):
        same(
            ef14.step_units(grads, C, START, decay),
            ef14.lr_corrected(grads, C, START, decay),
        )
        same(
            ef14.step_units(grads, C, START, constant(0.05)),
            ef14.gradient_units(grads, C, START, constant(0.05)),
        )
        differ(
            ef14.step_units(grads, C, START, decay),
            ef14.gradient_units(grads, C, START, decay),
        )
    # Not homogeneous: the unit matters.
    C = compress.hard_threshold(0.3)
    differ(ef14.step_units(grads, C, START, decay), ef14.lr_corrected(grads, C, START, decay))


def test_ef14_conservation_and_virtual_iterate():
    grads, gamma = quadratics_3(), lambda t: 0.05 / (t + 1)
    steps = run(ef14.step_units(grads, TOP1, START, gamma), ROUNDS)
    for i in range(3):
        sent = np.sum([s.c[i] for s in steps], axis=0)
        owed = np.sum([gamma(t) * s.g[i] for t, s in enumerate(steps)], axis=0)
        np.testing.assert_allclose(sent + steps[-1].e[i], owed, rtol=TOLERANCE, atol=TOLERANCE)
    virtual = [START] + [s.x - np.mean(s.e, axis=0) for s in steps]
    for t, s in enumerate(steps):
        expected = virtual[t] - gamma(t) * np.mean(s.g, axis=0)
        np.testing.assert_allclose(virtual[t + 1], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_injection_keeps_mass_and_retention_loses_a_stated_part():
    grads = quadratics_3()
    steps = run(ef14.gradient_units(grads, TOP1, START, constant(0.05), injection=0.3), ROUNDS)
    balance = np.sum([s.c[0] for s in steps], axis=0) + steps[-1].e[0]
    owed = np.sum([s.g[0] for s in steps], axis=0)
    np.testing.assert_allclose(balance, owed, rtol=TOLERANCE, atol=TOLERANCE)
    b = 0.9
    steps = run(ef14.gradient_units(grads, TOP1, START, constant(0.05), retention=b), ROUNDS)
    decayed = sum(b ** (ROUNDS - t) * (s.g[0] - s.c[0]) for t, s in enumerate(steps))
    np.testing.assert_allclose(steps[-1].e[0], decayed, rtol=1e-11, atol=TOLERANCE)


@pytest.mark.parametrize("C", [TOP1, compress.scaled_sign, compress.identity])
def test_ef_momentum_is_damped_ef14(C):
    grads, beta = quadratics_3(), 0.9
    same(
        ef14.ef_momentum(grads, C, START, 0.05, beta),
        ef14.damped(grads, C, START, 0.05, beta),
    )
    for s, r in zip(
        run(ef14.ef_momentum(grads, C, START, 0.05, beta), ROUNDS),
        run(ef14.damped(grads, C, START, 0.05, beta), ROUNDS),
        strict=True,
    ):
        np.testing.assert_allclose(s.m[0], (1 - beta) * (r.r[0] + r.c[0]), atol=1e-12)


def test_two_sided():
    grads, exact = quadratics_3(), compress.identity
    same(
        two_sided.double_squeeze(grads, TOP1, exact, START, 0.05),
        ef14.gradient_units(grads, TOP1, START, constant(0.05)),
    )
    same(
        two_sided.dist_ef_sgdm(grads, TOP1, exact, START, constant(0.05), 0.0),
        ef14.gradient_units(grads, TOP1, START, constant(0.05)),
    )
    # The virtual iterate x - gamma (E + mean e_i) moves by the exact mean gradient.
    steps = run(two_sided.double_squeeze(grads, TOP1, TOP2, START, 0.05), ROUNDS)
    before = START
    for previous, s in zip([Step(x=START), *steps], steps, strict=False):
        virtual = s.x - 0.05 * (s.E + np.mean(s.e, axis=0))
        expected = before - 0.05 * np.mean([g(previous.x) for g in grads], axis=0)
        np.testing.assert_allclose(virtual, expected, rtol=TOLERANCE, atol=TOLERANCE)
        before = virtual


def test_dgc():
    grads = quadratics_3()
    same(
        two_sided.dgc(grads, 1, START, 0.05, 0.0),
        ef14.gradient_units(grads, TOP1, START, constant(0.05)),
    )
    d, identity = len(START), compress.identity
    sgd = lambda scale: ef14.plain(grads, identity, START, scale * 0.05)  # noqa: E731
    same(two_sided.dgc(grads, d, START, 0.05, 0.5), sgd(1.0))
    same(two_sided.dgc(grads, d, START, 0.05, 0.5, nesterov=True), sgd(1.5))
    heavy = two_sided.dgc(grads, d, START, 0.05, 0.5, masking=False)
    same(heavy, ef21.heavy_ball(grads, identity, START, 0.05, 0.5))
    for nesterov in (False, True):
        steps = run(two_sided.dgc(grads, 1, START, 0.05, 0.5, nesterov=nesterov), ROUNDS)
        total = np.sum([s.sent[0] for s in steps], axis=0) + steps[-1].v[0]
        increments = np.sum([s.increments[0] for s in steps], axis=0)
        np.testing.assert_allclose(total, increments, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------------------- EF21 and relatives

EQUAL_TO_EF21 = {
    "ef-bv(1, 1)": lambda f: difference.ef_bv(f, [TOP1] * 3, START, 0.05, 1.0, 1.0),
    "3pc": lambda f: difference.three_point(f, difference.rule_ef21(TOP1), START, 0.05, TOP1),
    "clag(0)": lambda f: difference.three_point(
        f, difference.rule_clag(TOP1, 0.0), START, 0.05, TOP1
    ),
    "bc(server I)": lambda f: ef21.bidirectional(f, TOP1, compress.identity, START, 0.05),
    "pp(all)": lambda f: ef21.partial_participation(f, TOP1, START, 0.05, lambda t: [True] * 3),
    "hb(0)": lambda f: ef21.heavy_ball(f, TOP1, START, 0.05, 0.0),
    "sgdm(1)": lambda f: ef21.momentum(f, TOP1, START, 0.05, 1.0),
    "sgd2m(1)": lambda f: ef21.double_momentum(f, TOP1, START, 0.05, 1.0),
    "prox(0)": lambda f: ef21.proximal(f, TOP1, compress.identity, START, 0.05),
    "w(1/n)": lambda f: ef21.weighted(f, TOP1, START, 0.05, [1 / 3] * 3),
    "w(homogeneous)": lambda f: ef21.weighted(f, TOP1, START, 0.05, [0.2, 0.5, 0.3]),
    "econtrol(0)": lambda f: difference.econtrol(f, TOP1, START, 0.05, 0.0, start="zero"),
}


@pytest.mark.parametrize("name", EQUAL_TO_EF21)
def test_special_cases_of_ef21(name: str):
    grads = quadratics_3()
    same(EQUAL_TO_EF21[name](grads), ef21.ef21(grads, TOP1, START, 0.05))


def test_ef21_identities():
    grads, identity = quadratics_3(), compress.identity
    gradient_descent = ef14.plain(grads, identity, START, 0.05)
    same(ef21.ef21(grads, identity, START, 0.05), gradient_descent)
    same(
        ef21.page(grads, [], TOP1, START, 0.05, lambda t: True),
        ef21.ef21(grads, TOP1, START, 0.05, init="full"),
    )
    same(
        difference.econtrol(grads, identity, START, 0.05, 0.1),
        ef14.plain(grads, identity, START, 0.05),
    )
    for s in run(ef21.ef21(grads, TOP1, START, 0.05), ROUNDS):
        np.testing.assert_allclose(s.g, np.mean(s.g_i, axis=0), rtol=TOLERANCE, atol=TOLERANCE)
    # "zero" is the default start one wasted round later.
    zero = iterates(ef21.ef21(grads, TOP1, START, 0.05, init="zero"), ROUNDS + 1)
    default = iterates(ef21.ef21(grads, TOP1, START, 0.05), ROUNDS)
    np.testing.assert_allclose(zero[0], START, atol=0)
    np.testing.assert_allclose(zero[1:], default, rtol=TOLERANCE, atol=TOLERANCE)


def test_page_with_minibatches_uses_the_same_sample_twice():
    """With the full gradient as minibatch, PAGE's recursion stays exact for any coin."""
    grads = quadratics_3()
    parts = [lambda x, t, g=g: g(x) + 10.0 * t for g in grads]  # noise that cancels
    same(
        ef21.page(grads, parts, TOP1, START, 0.05, lambda t: t % 3 == 0),
        ef21.ef21(grads, TOP1, START, 0.05, init="full"),
    )


def test_ef21_is_ef14_for_additive_compressors_only():
    grads = quadratics_3()
    linear = compress.mask(np.array([True, False, True, True, False]))
    same(
        ef21.ef21(grads, linear, START, 0.05),
        ef14.step_units(grads, linear, START, constant(0.05)),
    )
    differ(
        ef21.ef21(grads, TOP1, START, 0.05),
        ef14.step_units(grads, TOP1, START, constant(0.05)),
    )


def test_ef21_plus_is_never_further_away():
    grads = quadratics_3()
    for C in (TOP1, TOP2):
        steps = run(ef21.ef21_plus(grads, C, START, 0.05), ROUNDS)
        for before, after in zip(steps, steps[1:], strict=False):
            for i, grad in enumerate(grads):
                new = grad(before.x)
                candidate = before.g_i[i] + C(new - before.g_i[i])
                assert np.linalg.norm(after.g_i[i] - new) <= np.linalg.norm(candidate - new)


# ---------------------------------------------------------------------------- differences


def test_difference_methods():
    grads, identity = quadratics_3(), compress.identity

    def random(seed: int):
        rng = np.random.default_rng(seed)
        return [compress.random_k(2, rng) for _ in range(3)]

    a = 2 / 5  # 1/(1 + omega) with omega = 5/2 - 1
    same(
        difference.ef_bv(grads, random(0), START, 0.02, a, 1.0),
        difference.diana(grads, random(0), START, 0.02, a),
    )
    same(
        difference.three_point(grads, difference.rule_clag(identity, 0.7), START, 0.05, identity),
        difference.three_point(grads, difference.rule_lag(0.7), START, 0.05, identity),
    )
    at_round = [lambda x, t, g=g: g(x) for g in grads]
    same(
        difference.marina(at_round, [identity] * 3, START, 0.05, lambda t: t % 4 == 0),
        ef14.plain(grads, identity, START, 0.05),
    )
    same(
        difference.marina(at_round, random(1), START, 0.05, lambda t: True),
        ef14.plain(grads, identity, START, 0.05),
    )
    # EC-SGD-DIANA without control variates is EF14 in step units.
    same(
        difference.ec_sgd_diana(grads, TOP1, compress.nothing, START, 0.05, 0.5),
        ef14.step_units(grads, TOP1, START, constant(0.05)),
    )


def test_ef21_p_is_ef14_seen_from_the_virtual_iterate():
    grads = [lambda x: np.mean([g(x) for g in quadratics_3()], axis=0)]
    primal = run(difference.ef21_p(grads, TOP1, START, 0.05), ROUNDS)
    classic = run(ef14.step_units(grads, TOP1, START, constant(0.05)), ROUNDS)
    for p, c in zip(primal, classic, strict=True):
        np.testing.assert_allclose(p.w, c.x, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(p.x, c.x - c.e[0], rtol=TOLERANCE, atol=TOLERANCE)
    same(
        difference.ef21_p(grads, compress.identity, START, 0.05),
        ef14.plain(grads, compress.identity, START, 0.05),
    )


THREE_POINT = {
    "ef21": (difference.rule_ef21(TOP2), dict(variant="ef21", alpha=2 / 5)),
    "lag": (difference.rule_lag(2.0), dict(variant="lag", zeta=2.0)),
    "clag": (difference.rule_clag(TOP2, 2.0), dict(variant="clag", alpha=2 / 5, zeta=2.0)),
    "v1": (difference.rule_v1(TOP2), dict(variant="v1", alpha=2 / 5)),
    "v4": (
        difference.rule_v4(TOP2, TOP1),
        dict(variant="v4", alpha=2 / 5, second_alpha=1 / 5),
    ),
}


@pytest.mark.parametrize("name", THREE_POINT)
def test_three_point_inequality(name: str):
    """``||C_{h,y}(x) - x||^2 <= (1-A) ||h-y||^2 + B ||x-y||^2`` on random and hard inputs."""
    rule, arguments = THREE_POINT[name]
    A, B = theory.three_point_constants(**arguments)
    rng = np.random.default_rng(0)
    for trial in range(300):
        h, y, x = rng.normal(size=(3, 5)) * 10.0 ** rng.integers(-2, 3, size=(3, 1))
        if trial % 3 == 0:
            x, h = np.ones(5) * 1.001, y + np.sign(rng.normal(size=5))
        left = np.sum((rule(h, y, x) - x) ** 2)
        right = (1 - A) * np.sum((h - y) ** 2) + B * np.sum((x - y) ** 2)
        assert left <= right * (1 + 1e-9) + 1e-12


def test_random_three_point_inequalities_hold_on_average():
    rng = np.random.default_rng(1)
    d, k = 5, 2
    Q = compress.random_k(k, rng)
    cases = [
        (difference.rule_v2(TOP1, Q), dict(variant="v2", alpha=1 / d, omega=d / k - 1)),
        (
            difference.rule_v5(TOP1, lambda: rng.uniform() < 0.3),
            dict(variant="v5", alpha=1 / d, probability=0.3),
        ),
        (
            difference.rule_v3(TOP1, difference.rule_v2(TOP1, Q)),
            dict(
                variant="v3",
                alpha=1 / d,
                inner=theory.three_point_constants("v2", alpha=1 / d, omega=d / k - 1),
            ),
        ),
    ]
    for rule, arguments in cases:
        A, B = theory.three_point_constants(**arguments)
        for _ in range(10):
            h, y, x = rng.normal(size=(3, d))
            errors = [np.sum((rule(h, y, x) - x) ** 2) for _ in range(400)]
            right = (1 - A) * np.sum((h - y) ** 2) + B * np.sum((x - y) ** 2)
            assert np.mean(errors) <= right + 4 * np.std(errors) / math.sqrt(len(errors))


def test_econtrol_memory_is_the_running_sum():
    grads = quadratics_3()
    for start in ("dense", "zero"):
        steps = run(difference.econtrol(grads, TOP1, START, 0.02, 0.1, start=start), ROUNDS)
        for s in steps:
            np.testing.assert_allclose(s.e_i, s.sums, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------- repeated, shared


def test_repeated_top_k_is_a_larger_top_k():
    x = np.random.default_rng(2).normal(size=12)
    for R in (1, 2, 4):
        np.testing.assert_array_equal(
            repeated.fcc(compress.top_k(2), x, R), compress.top_k(2 * R)(x)
        )


def test_local_steps_of_length_one():
    grads = quadratics_3()
    same(
        repeated.qsparse_local_sgd(grads, TOP1, START, 0.05, 1),
        ef14.step_units(grads, TOP1, START, constant(0.05)),
    )


def test_cser():
    grads, exact, zero = quadratics_3(), compress.identity, compress.nothing
    same(
        repeated.cser(grads, exact, zero, START, 0.05, 1),
        ef14.plain(grads, exact, START, 0.05),
    )
    period, steps = 4, 12
    models = [START] * 3
    for t in range(steps):
        models = [x - 0.05 * g(x) for g, x in zip(grads, models, strict=True)]
        if (t + 1) % period == 0:
            models = [np.mean(models, axis=0)] * 3
    last = run(repeated.cser(grads, exact, zero, START, 0.05, period), steps)[-1]
    np.testing.assert_allclose(last.x, models[0], rtol=TOLERANCE, atol=TOLERANCE)
    for s in run(repeated.cser(grads, TOP2, TOP1, START, 0.05, 3), ROUNDS):
        common = [x - e for x, e in zip(s.x_i, s.e, strict=True)]
        np.testing.assert_allclose(common, [common[0]] * 3, rtol=1e-11, atol=1e-11)


def test_scalecom_with_full_memory_and_one_worker_is_ef14():
    grads = quadratics_3()[:1]
    same(
        repeated.scalecom(grads, 2, START, 0.05, 1.0),
        ef14.gradient_units(grads, TOP2, START, constant(0.05)),
    )


def test_adacomp_sends_each_bins_largest_and_keeps_the_rest():
    step = run(repeated.adacomp([lambda x: x], 2, np.array([4.0, 1.0, 3.0, 2.0]), 0.1), 1)[0]
    # H = 2 g reaches the bins' maxima 4 and 3 at 8, 6 and 4, not at 2; the value is their mean.
    np.testing.assert_array_equal(step.sent[0], [3.5, 0.0, 3.5, 3.5])
    np.testing.assert_array_equal(step.r[0], [0.5, 1.0, -0.5, -1.5])


def test_safe_ef_without_constraint_is_ef14():
    grads = quadratics_3()
    same(
        repeated.safe_ef(grads, lambda x: -1.0, grads, TOP1, compress.identity, START, 0.05),
        ef14.gradient_units(grads, TOP1, START, constant(0.05)),
    )


# ---------------------------------------------------------------------------- rates


def heterogeneous(n: int = 5, d: int = 6):
    """Quadratics with very different constants, their theory and the optimal value."""
    rng = np.random.default_rng(3)
    A = [rng.normal(size=(10, d)) * s for s in (0.3, 0.5, 1.0, 2.0, 4.0)]
    b = [rng.normal(size=10) for _ in range(n)]
    grads = [lambda x, A=Ai, b=bi: A.T @ (A @ x - b) / 10 for Ai, bi in zip(A, b, strict=True)]
    H = np.mean([Ai.T @ Ai / 10 for Ai in A], axis=0)
    best = np.linalg.solve(H, np.mean([Ai.T @ bi / 10 for Ai, bi in zip(A, b, strict=True)], 0))

    def gap(x):
        return 0.5 * (x - best) @ H @ (x - best)

    return grads, theory.least_squares(A), gap


@pytest.mark.parametrize("mean", ["QM", "AM"])
def test_ef21_rate_is_not_exceeded(mean: str):
    grads, constants, gap = heterogeneous()
    x, alpha, T = np.full(6, 2.0), 1 / 6, 2000
    gamma = theory.ef21_step(constants, alpha, mean=mean)
    steps = run(ef21.ef21(grads, TOP1, x, gamma), T)
    norms = [np.sum(np.mean([g(p) for g in grads], 0) ** 2) for p in [x] + [s.x for s in steps]]
    G0 = np.mean([np.sum((TOP1(g(x)) - g(x)) ** 2) for g in grads])
    for t in (1, 10, 100, T):
        assert np.mean(norms[:t]) <= theory.ef21_bound(gamma, alpha, gap(x), G0, t)
    # And it converges: the gradient norm falls by six orders of magnitude.
    assert norms[-1] < 1e-6 * norms[0]


def test_heterogeneous_workers_need_feedback():
    """Compressed descent without memory blows up where EF14 and EF21 converge."""
    a = [np.array(v, float) for v in ((-3, 2, 2), (2, -3, 2), (2, 2, -3))]
    grads = [lambda x, a=ai: 2 * (a @ x) * a + 0.5 * x for ai in a]
    x, gamma = np.ones(3), 0.01
    size = lambda oracle: np.linalg.norm(iterates(oracle, 600)[-1])  # noqa: E731
    assert size(ef14.plain(grads, TOP1, x, gamma)) > 1e3
    assert size(ef14.step_units(grads, TOP1, x, constant(gamma))) < 1e-2
    assert size(ef21.ef21(grads, TOP1, x, gamma)) < 1e-2


def test_ef14_residual_bound_holds():
    grads, gamma = quadratics_3(), 0.02
    steps = run(ef14.step_units(grads[:1], TOP1, START, constant(gamma)), 500)
    second_moment = max(np.sum(s.g[0] ** 2) for s in steps)
    bound = theory.ef14_residual_bound(1 / 5, gamma, second_moment)
    assert max(np.sum(s.e[0] ** 2) for s in steps) <= bound
