"""At theory's step sizes the published bounds hold, and everything converges.

Least squares of five workers whose smoothness constants differ by a factor of 200, in float64. All
methods run in one program a test; each has its own step from :mod:`ef_optax.theory`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax import theory

AXIS, ROUNDS, D = "workers", 2000, 6
TOP = ef.top_k(k=1)
ALPHA = TOP.codec.alpha((D,))
RANDOM = ef.random_k(key=3, k=3, scaled=True)
OMEGA = RANDOM.codec.omega((D,))

_rng = np.random.default_rng(3)
A = np.stack([_rng.normal(size=(10, D)) * s for s in (0.3, 0.5, 1.0, 2.0, 4.0)])
B = _rng.normal(size=(5, 10))
START = np.full(D, 2.0)
CONSTANTS = theory.least_squares(list(A))
CLONES = theory.cloning(CONSTANTS)
HESSIAN = np.mean(A.transpose(0, 2, 1) @ A / 10, axis=0)
MU = np.linalg.eigvalsh(HESSIAN)[0]


def gradients(x, A=A, B=B):
    """Gradient of every worker at x."""
    return (A.transpose(0, 2, 1) @ (A @ x - B)[..., None])[..., 0] / A.shape[1]


BEST = np.linalg.solve(HESSIAN, np.mean((A.transpose(0, 2, 1) @ B[..., None])[..., 0] / 10, axis=0))
GAP = 0.5 * (START - BEST) @ HESSIAN @ (START - BEST)
FIRST = gradients(START)


@dataclasses.dataclass(frozen=True)
class Method:
    """A rule and its step."""

    rule: optax.GradientTransformation
    step: float
    clones: theory.Cloning | None = None


def run(methods, rounds=ROUNDS, data=(A, B), start=START):
    """``||grad f||^2`` at the iterates of every method, the first one at the start, and states."""
    with jax.enable_x64(True):
        A, B = (jnp.asarray(part) for part in data)
        n = len(A)

        def at(x):
            return gradients(x, A, B)

        lifted = {
            name: ef.simulate(
                optax.chain(m.rule, optax.sgd(m.step)), m.clones.total if m.clones else n, AXIS
            )
            for name, m in methods.items()
        }

        def step(carry, _):
            after, norms, memories = {}, {}, {}
            for name, (x, state) in carry.items():
                clones = methods[name].clones
                of = {p: at(y) for p, y in ef.query_points(state, x).items()}
                norms[name] = jnp.sum(of["params"].mean(0) ** 2)
                of = {p: clones.gradients(g) for p, g in of.items()} if clones else of
                updates, state = lifted[name].update(of["params"], state, x, grads=of)
                after[name] = optax.apply_updates(x, updates), state
                memories[name] = getattr(state[0], "estimate", ())
            return after, (norms, memories)

        carry = {
            name: (jnp.asarray(start), tx.init(jnp.asarray(start))) for name, tx in lifted.items()
        }
        last, seen = jax.jit(lambda c: jax.lax.scan(step, c, None, length=rounds))(carry)
    norms, memories = jax.device_get(seen)
    return norms, memories, {name: np.asarray(x) for name, (x, _) in last.items()}


def top_1(x):
    return np.where(np.arange(D) == np.argmax(np.abs(x), axis=-1)[..., None], x, 0.0)


def distortion(targets, weights=None):
    """``sum_i w_i ||g_i^0 - target_i||^2`` for the compressed start."""
    return np.average(np.sum((top_1(targets) - targets) ** 2, axis=-1), weights=weights)


@pytest.mark.slow
def test_rates_of_ef21_are_not_exceeded():
    """QM and AM steps, EF21-W, clones, triggers: the mean of the squared gradient norms."""
    w = np.asarray(theory.weights(CONSTANTS))
    clag = theory.three_point_constants("clag", alpha=ALPHA, zeta=2.0)
    v4 = theory.three_point_constants("v4", alpha=ALPHA, second_alpha=ALPHA)
    methods = {
        "QM": Method(ef.ef21(TOP, axis_name=AXIS), theory.ef21_step(CONSTANTS, ALPHA, mean="QM")),
        "AM": Method(ef.ef21(TOP, axis_name=AXIS), theory.ef21_step(CONSTANTS, ALPHA)),
        "W": Method(ef.ef21_w(TOP, tuple(w), axis_name=AXIS), theory.ef21_w_step(CONSTANTS, ALPHA)),
        "clones": Method(
            ef.ef21(TOP, axis_name=AXIS), theory.cloning_step(CONSTANTS, ALPHA), CLONES
        ),
        "clag": Method(
            ef.three_point_compressor("clag", TOP, zeta=2.0, axis_name=AXIS),
            theory.three_point_step(CONSTANTS, clag),
        ),
        "v4": Method(
            ef.three_point_compressor("v4", TOP, second=TOP, axis_name=AXIS),
            theory.three_point_step(CONSTANTS, v4),
        ),
    }
    plain = distortion(FIRST)
    start = {
        "W": distortion(FIRST / (5 * w[:, None]), w),
        "clones": distortion(CLONES.gradients(FIRST)),
    }
    contraction = {"clag": clag.A, "v4": v4.A}
    norms, _, _ = run(methods)
    for name, method in methods.items():
        G0, A = start.get(name, plain), contraction.get(name, theory.theta(ALPHA))
        for T in (1, 10, 100, ROUNDS):
            bound = 2 * GAP / (method.step * T) + G0 / (A * T)
            assert np.mean(norms[name][:T]) <= bound, (name, T)
            if name not in contraction:
                assert bound == pytest.approx(theory.ef21_bound(method.step, ALPHA, GAP, G0, T))
        assert norms[name][-1] < 1e-5 * norms[name][0], name


def test_linear_rate_of_ef21_under_the_pl_condition():
    """``f - f* + (gamma/theta) G`` shrinks by ``1 - gamma mu`` in every round."""
    gamma = theory.ef21_pl_step(CONSTANTS, ALPHA, MU)
    _, _, last = run({"pl": Method(ef.ef21(TOP, axis_name=AXIS), gamma)}, 300)
    off = last["pl"] - BEST
    bound = (1 - gamma * MU) ** 300 * (GAP + gamma / theory.theta(ALPHA) * distortion(FIRST))
    assert 0.5 * off @ HESSIAN @ off <= bound


@pytest.mark.slow
def test_everything_converges_at_its_step():
    """Randomised methods, momentum and participation, whose rates hold on average."""
    bv = theory.ef_bv_parameters(0.0, OMEGA, OMEGA / 5)
    v2 = theory.three_point_constants("v2", alpha=ALPHA, omega=OMEGA)
    methods = {
        "HB": Method(
            ef.ef21_heavy_ball(TOP, 0.5, axis_name=AXIS),
            theory.ef21_heavy_ball_step(CONSTANTS, ALPHA, 0.5),
        ),
        "PP": Method(
            ef.ef21_partial_participation(TOP, 0.5, 0, axis_name=AXIS),
            theory.ef21_partial_participation_step(CONSTANTS, ALPHA, 0.5),
        ),
        "SGDM": Method(
            ef.ef21_momentum(TOP, 0.5, axis_name=AXIS),
            theory.ef21_momentum_step(CONSTANTS, ALPHA, 0.5),
        ),
        "EF-BV": Method(
            ef.ef_bv(RANDOM, bv.lam, bv.nu, axis_name=AXIS), theory.ef_bv_step(CONSTANTS, bv)
        ),
        "DIANA": Method(ef.diana(RANDOM, axis_name=AXIS), theory.diana_step(CONSTANTS, OMEGA)),
        "MARINA": Method(
            ef.marina(RANDOM, 0.5, 0, axis_name=AXIS), theory.marina_step(CONSTANTS, OMEGA, 0.5)
        ),
        "PP-MARINA": Method(
            ef.marina(RANDOM, 0.2, 0, participants=2, axis_name=AXIS),
            theory.marina_step(CONSTANTS, OMEGA, 0.2, participants=2),
        ),
        "3PC v2": Method(
            ef.three_point_compressor("v2", TOP, second=RANDOM, axis_name=AXIS),
            theory.three_point_step(CONSTANTS, v2),
        ),
    }
    norms, _, _ = run(methods, 6000)
    for name, method in methods.items():
        if "MARINA" in name:  # E of the mean of the squared norms is at most 2 gap/(gamma T)
            assert np.mean(norms[name]) <= 2 * GAP / (method.step * 6000), name
        assert norms[name][-1] < 1e-4 * norms[name][0], name


@pytest.mark.parametrize("init", ["zero", "compressed"])
def test_rare_features_are_never_estimated_where_they_are_not_seen(init):
    """The start that the larger step needs: an estimate is zero on features a worker lacks."""
    n, d, rng = 6, 12, np.random.default_rng(5)
    seen = np.zeros((n, d), bool)
    for j in range(d):  # every feature on two workers
        seen[[j % n, (j + 1) % n], j] = True
    A = rng.normal(size=(n, 5, d)) * seen[:, None, :]
    b = rng.normal(size=(n, 5))
    constants = theory.least_squares(list(A))
    c = theory.rare_feature_count(list(A))
    alpha = ef.top_k(k=1).codec.alpha((d,))
    step = theory.rare_features_step(constants, alpha, c)
    assert c == 2 and step > 1.3 * theory.ef21_step(constants, alpha, mean="QM")
    method = Method(ef.ef21(ef.top_k(k=1), axis_name=AXIS, init=init), step)
    norms, estimates, _ = run({"rare": method}, 3000, (A, b), np.ones(d))
    assert not estimates["rare"][:, ~seen].any() and estimates["rare"][-1][seen].any()
    assert norms["rare"][-1] < 1e-4 * norms["rare"][0]


def test_compressed_descent_without_memory_diverges_where_theory_says_so():
    """Three workers whose largest coordinates cancel: top-1 of each points uphill."""
    a = np.array([(-3.0, 2.0, 2.0), (2.0, -3.0, 2.0), (2.0, 2.0, -3.0)])
    # f_i = (a_i x)^2 + |x|^2/4, written as least squares with four rows
    A = np.stack([np.vstack([np.sqrt(8) * ai, np.sqrt(2) * np.eye(3)]) for ai in a])
    methods = {
        "plain": Method(ef.compressed_mean(TOP, axis_name=AXIS), 0.01),
        "ef14": Method(ef.error_feedback(TOP, axis_name=AXIS), 0.01),
        "ef21": Method(ef.ef21(TOP, axis_name=AXIS), 0.01),
    }
    _, _, last = run(methods, 600, (A, np.zeros((3, 4))), np.ones(3))
    assert np.linalg.norm(last["plain"]) > 1e3
    assert max(np.linalg.norm(last[name]) for name in ("ef14", "ef21")) < 1e-2
