"""Theory: constants against closed forms and data, step sizes against their definitions."""

from __future__ import annotations

import math
import os
import pathlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from ef_optax import theory

alphas = st.floats(1e-6, 1.0)
constants = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(
    lambda L_i: theory.Smoothness(L=sum(L_i) / len(L_i), L_i=tuple(L_i))
)


# ---------------------------------------------------------------------------- contraction


@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (1.0, 0.0),
        (0.75, 1.0),
        (0.5, 1 + math.sqrt(2)),
        (0.36, 4.0),
        (0.25, 6.464101615138),
        (0.1, 18.486832980505),
        (0.01, 198.498743710662),
    ],
)
def test_xi_values(alpha: float, value: float):
    assert theory.xi(alpha) == pytest.approx(value, abs=5e-13 * max(1, value))


@given(alphas)
def test_xi_forms_agree(alpha: float):
    assert theory.xi(alpha) == pytest.approx(
        math.sqrt(theory.beta(alpha) / theory.theta(alpha)), rel=1e-9, abs=1e-9
    )
    assert theory.xi(alpha) <= 2 / alpha - 1 + 1e-9


def test_small_alpha_has_no_cancellation():
    # theta = alpha/2 + alpha^2/8 + ...; the naive 1 - sqrt(1 - alpha) is 11% off here.
    assert theory.theta(1e-15) == pytest.approx(5e-16, rel=1e-14)
    assert theory.xi(1e-15) == pytest.approx(2e15, rel=1e-14)


@pytest.mark.parametrize(
    ("momentum", "alpha", "value"),
    [(0.9, 0.01, 0.0010022613208), (0.9, 1.0, 0.19), (0.5, 0.1, 0.0506583509747)],
)
def test_damped_contraction(momentum: float, alpha: float, value: float):
    assert theory.damped_contraction(alpha, momentum) == pytest.approx(value, rel=1e-11)


@given(alphas, st.integers(1, 50))
def test_repeated_contraction(alpha: float, rounds: int):
    left = 1.0
    for _ in range(rounds):
        left *= 1 - alpha
    assert theory.repeated_contraction(alpha, rounds) == pytest.approx(1 - left, rel=1e-9)


# ---------------------------------------------------------------------------- constants


def test_example_of_the_paper():
    c = theory.Smoothness(L=1.0, L_i=(1.0, 1.0, 1.0, 100.0))
    assert c.L_QM == 50.00749943758436
    assert (c.L_AM, c.L_var) == (25.75, 1837.6875)
    cloned = theory.cloning(c)
    assert cloned.counts == (1, 1, 1, 4) and cloned.total == 7
    assert cloned.constants.L_QM == pytest.approx(33.0917285737690, rel=1e-14)
    assert math.sqrt(2) * c.L_AM == pytest.approx(36.4159992311072, rel=1e-14)
    assert theory.weights(c) == (1 / 103, 1 / 103, 1 / 103, 100 / 103)


@given(constants, alphas)
def test_cloning_promises(c: theory.Smoothness, alpha: float):
    cloned = theory.cloning(c)
    assert cloned.total <= 2 * c.num_workers
    assert cloned.constants.L_QM <= math.sqrt(2) * c.L_AM * (1 + 1e-9)
    # The mean over the clones of scales[i] f_i is f: every worker keeps the weight 1/n.
    share = [
        count * scale / cloned.total
        for count, scale in zip(cloned.counts, cloned.scales, strict=True)
    ]
    np.testing.assert_allclose(share, 1 / c.num_workers, rtol=1e-12)
    exact = theory.ef21_step(cloned.constants, alpha, mean="QM")
    assert exact >= theory.cloning_step(c, alpha) * (1 - 1e-12)


def test_equal_workers_are_not_cloned():
    assert theory.cloning(theory.Smoothness(L=0.1, L_i=(0.1,) * 7)).counts == (1,) * 7


def quadratic_parts(seed: int = 0, n: int = 4, d: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(3 + 2 * i, d)) * (i + 1) for i in range(n)]


def test_least_squares_is_the_spectrum_of_the_hessians():
    parts, d = quadratic_parts(), 6
    H = [2 * A.T @ A / len(A) + (0.3 + 0.2) * np.eye(d) for A in parts]
    c = theory.least_squares(parts, scale=2.0, l2=0.3, nonconvex=0.1)
    np.testing.assert_allclose(c.L_i, [np.linalg.norm(h, 2) for h in H], rtol=1e-12)
    assert c.L == pytest.approx(np.linalg.norm(np.mean(H, 0), 2), rel=1e-12)
    assert c.L_plus is None

    H = [2 * A.T @ A / len(A) + 0.3 * np.eye(d) for A in parts]
    c = theory.least_squares(parts, scale=2.0, l2=0.3)
    largest = np.linalg.norm(np.mean([h @ h for h in H], 0), 2)
    assert c.L_plus == pytest.approx(math.sqrt(largest), rel=1e-12)
    assert c.L <= c.L_plus <= c.L_QM


def logistic_loss(x: jax.Array, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    A, b = data
    return jnp.mean(jnp.log1p(jnp.exp(-b * (A @ x)))) + 0.1 * jnp.sum(x**2 / (1 + x**2))


def test_power_iteration_finds_the_logistic_constants():
    """The largest curvature of the regularised logistic loss is at zero, and is the closed form."""
    rng = np.random.default_rng(1)
    A = rng.normal(size=(3, 8, 5)) * np.array([1.0, 2.0, 5.0])[:, None, None]
    b = np.sign(rng.normal(size=(3, 8)))
    exact = theory.logistic_regression(list(A), nonconvex=0.1)
    with jax.enable_x64(True):
        data = (jnp.asarray(A), jnp.asarray(b))
        at_zero = theory.estimate(logistic_loss, jnp.zeros(5), data, iterations=300)
        away = theory.estimate(logistic_loss, jnp.ones(5), data, iterations=20)
    assert at_zero.L == pytest.approx(exact.L, rel=1e-6)
    np.testing.assert_allclose(at_zero.L_i, exact.L_i, rtol=1e-6)
    assert away.L < exact.L and all(a < e for a, e in zip(away.L_i, exact.L_i, strict=True))


def test_curvature_takes_the_largest_magnitude_and_survives_a_zero_hessian():
    def indefinite(p):
        return 0.5 * (jnp.sum(p["a"] ** 2) - 4 * jnp.sum(p["b"] ** 2))

    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    assert float(theory.curvature(indefinite, params)) == pytest.approx(4, rel=1e-5)
    assert float(theory.curvature(lambda p: jnp.sum(p["a"]), params, iterations=3)) == 0


# ---------------------------------------------------------------------------- data


def read_libsvm(path: pathlib.Path) -> np.ndarray:
    """The dense features of a LIBSVM text file."""
    rows = [line.split()[1:] for line in path.read_text().splitlines() if line.strip()]
    pairs = [[(int(j), float(v)) for j, v in (p.split(":") for p in row)] for row in rows]
    A = np.zeros((len(rows), max(j for row in pairs for j, _ in row)))
    for i, row in enumerate(pairs):
        for j, v in row:
            A[i, j - 1] = v
    return A


def in_file_order(A: np.ndarray, n: int) -> list[np.ndarray]:
    """The published split: n equal consecutive chunks, the remainder to the last worker."""
    m = len(A) // n
    return [A[i * m : (i + 1) * m if i < n - 1 else len(A)] for i in range(n)]


@pytest.mark.parametrize(
    ("name", "L", "L_QM", "L_AM"),
    [
        ("mushrooms", 2.7862142339, 3.4932259751, 3.4711203982),
        ("a9a", 1.7719196992, 1.7730670813, 1.7730413152),
    ],
)
def test_constants_of_the_libsvm_sets(name: str, L: float, L_QM: float, L_AM: float):
    root = os.environ.get("EF_OPTAX_DATA")
    path = pathlib.Path(root or ".") / "libsvm" / name
    if not (root and path.exists()):
        pytest.skip(f"EF_OPTAX_DATA has no libsvm/{name}")
    A = read_libsvm(path)
    pooled = theory.logistic_regression([A], nonconvex=0.1)
    split = theory.logistic_regression(in_file_order(A, 20), nonconvex=0.1)
    assert pooled.L == pytest.approx(L, abs=1e-10)
    assert split.L_QM == pytest.approx(L_QM, abs=1e-10)
    assert split.L_AM == pytest.approx(L_AM, abs=1e-10)


def test_constants_of_breast_cancer_are_consistent():
    datasets = pytest.importorskip("sklearn.datasets")
    A = datasets.load_breast_cancer().data
    A = A / np.abs(A).max(0)
    c = theory.logistic_regression(in_file_order(A, 20), nonconvex=0.1)
    # Convexity of the largest eigenvalue, and the ordering of the means.
    assert c.L <= c.L_AM <= c.L_QM <= c.L_max
    assert c.L_var == pytest.approx(c.L_QM**2 - c.L_AM**2, abs=1e-10)
    # Data term: between trace/(4 m d) and trace/(4 m) on each worker.
    for part, L_i in zip(in_file_order(A, 20), c.L_i, strict=True):
        trace = np.sum(part**2) / (4 * len(part))
        assert trace / A.shape[1] <= L_i - 0.2 <= trace * (1 + 1e-12)


# ---------------------------------------------------------------------------- step sizes


@given(constants, alphas)
def test_the_order_of_the_steps(c: theory.Smoothness, alpha: float):
    quadratic, arithmetic = (theory.ef21_step(c, alpha, mean=m) for m in ("QM", "AM"))
    slack = 1 + 1e-12
    assert quadratic <= arithmetic * slack
    assert arithmetic == theory.ef21_w_step(c, alpha)
    assert theory.cloning_step(c, alpha) <= arithmetic * slack
    assert theory.ef21_pl_step(c, alpha, mu=1e-9) <= quadratic * slack
    assert theory.rare_features_step(c, alpha, c.num_workers) >= quadratic / slack
    assert theory.ef21_heavy_ball_step(c, alpha, 0.0) == quadratic
    participation = theory.ef21_partial_participation_step(c, alpha, 1.0)
    assert participation == pytest.approx(quadratic, rel=1e-12)
    assert theory.ef21_partial_participation_step(c, alpha, 0.5) < quadratic


@given(constants, alphas)
def test_ef_bv_and_3pc_contain_ef21(c: theory.Smoothness, alpha: float):
    quadratic = theory.ef21_step(c, alpha, mean="QM")
    three_point = theory.three_point_constants("ef21", alpha=alpha)
    assert theory.three_point_step(c, three_point) == pytest.approx(quadratic, rel=1e-9)
    # A deterministic compressor: bias sqrt(1 - alpha), no variance, lambda = nu = 1, r = 1 - alpha.
    # EF-BV's analysis then allows a smaller step than EF21's.
    bv = theory.ef_bv_parameters(eta=math.sqrt(1 - alpha), omega=0.0)
    assert bv.lam == bv.nu == 1
    if bv.r > 0:
        assert bv.r == pytest.approx(1 - alpha, rel=1e-9, abs=1e-12)
        assert theory.ef_bv_step(c, bv) <= quadratic * (1 + 1e-9)


def test_strength_of_econtrol():
    """A quarter of the squared norm lost, nearly everything lost, and more of it sent."""
    assert theory.econtrol_strength(0.75) == pytest.approx(0.75 / (3 * 0.5 * 1.5))
    assert theory.econtrol_strength(1e-6) == pytest.approx(1e-6 / 6, rel=1e-5)
    strengths = [theory.econtrol_strength(alpha) for alpha in (0.1, 0.5, 0.9, 0.999)]
    assert strengths == sorted(strengths)
    with pytest.raises(ValueError, match="alpha=1 must be below 1"):
        theory.econtrol_strength(1)


def test_ef_bv_for_unbiased_compressors_is_diana():
    bv = theory.ef_bv_parameters(eta=0.0, omega=3.0, omega_av=0.0)
    assert bv.lam == pytest.approx(1 / (1 + 3.0)) and bv.nu == 1
    assert bv.r == pytest.approx(0.75**2 + 3 / 16) and bv.r_av == 0


@pytest.mark.parametrize(
    ("arguments", "A", "B"),
    [
        (dict(variant="lag", zeta=3.0), 1.0, 3.0),
        (dict(variant="clag", alpha=0.75, zeta=3.0), 0.5, 3.0),
        (dict(variant="clag", alpha=0.75, zeta=0.1), 0.5, 0.5),
        (dict(variant="v1", alpha=0.25), 1.0, 0.75),
        (dict(variant="v2", alpha=0.25, omega=2.0), 0.25, 1.5),
        (dict(variant="v3", alpha=0.25, inner=theory.ThreePoint(0.5, 2.0)), 0.625, 1.5),
        (dict(variant="v4", alpha=0.5, second_alpha=0.5), 0.5, 0.5),
        (dict(variant="v5", alpha=0.25, probability=0.75), 0.5, 0.375),
    ],
)
def test_three_point_constants(arguments: dict, A: float, B: float):
    assert theory.three_point_constants(**arguments) == pytest.approx((A, B), rel=1e-12)


def test_partial_participation_optimises_its_free_parameters():
    c = theory.Smoothness(L=1.0, L_i=(2.0, 1.0))
    best = theory.ef21_partial_participation_step(c, 0.1, 0.3)
    grid = 0.0
    for rho in np.geomspace(1e-4, 1, 150):
        for s in np.geomspace(1e-4, 0.1, 60):
            if 1 - (1 + s) * 0.9 > 0 and 0.3 * (1 - (1 + s) * 0.9) - 0.7 * rho > 0:
                step = theory.ef21_partial_participation_step(c, 0.1, 0.3, rho=rho, s=s)
                grid = max(grid, step)
    assert grid <= best <= grid * 1.002


def test_rare_features_gain_of_the_synthetic_problem():
    """The gain over EF21's QM step is large when a feature is on 5% of 20 workers, none at 90%."""
    gains = []
    for share in (0.05, 0.5, 0.9):
        rng = np.random.default_rng(0)
        n, d, m, low, high = 20, 50, 12, 1.0, 20.0
        owners = np.zeros((n, d), bool)
        for j in range(d):
            owners[rng.choice(n, math.ceil(share * n), replace=False), j] = True
        parts = []
        for i in range(n):
            r = int(owners[i].sum())
            if r == 0:
                parts.append(np.full((m, d), 0.0))
                continue
            U, S, Vt = np.linalg.svd(rng.uniform(size=(m, r)), full_matrices=False)
            j = np.arange(len(S))
            S = 0.9 * np.sqrt((high - low) * j / max(r - 1, 1) + low) + (i == 0) * 1.0
            A = np.zeros((m, d))
            A[:, owners[i]] = (U * S) @ Vt * math.sqrt(m / 2)
            parts.append(A)
        parts = [A for A in parts if A.any()]
        c = theory.least_squares(parts, scale=2.0)
        shared = theory.rare_feature_count(parts)
        assert shared == math.ceil(share * n)
        # As the public code: without the exact L_plus.
        c = theory.Smoothness(c.L, c.L_i)
        alpha = 1 / d
        gains.append(
            theory.rare_features_step(c, alpha, shared) / theory.ef21_step(c, alpha, mean="QM")
        )
    assert gains[0] > 10 and 1.2 < gains[1] < 2 and 1 <= gains[2] < 1.2


# ---------------------------------------------------------------------------- bounds


def test_ef14_bounds():
    T, d, L, s2, f0 = 400, 0.1, 2.0, 3.0, 5.0
    tuned = theory.ef14_tuned_bound(d, L, s2, f0, T)
    by_hand = (4 * f0 + L * s2) / (2 * math.sqrt(T)) + 4 * L**2 * s2 * (1 - d) / (d**2 * T)
    assert tuned == pytest.approx(by_hand, rel=1e-12)
    when = theory.delay_rounds(d, L, s2, f0)
    half = theory.ef14_tuned_bound(d, L, s2, f0, math.ceil(when))
    assert half == pytest.approx(2 * theory.ef14_tuned_bound(1.0, L, s2, f0, math.ceil(when)), 1e-3)
    assert theory.ef14_residual_bound(1.0, 0.1, s2) == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: theory.xi(0.0), "alpha"),
        (lambda: theory.xi(1.5), "alpha"),
        (lambda: theory.damped_contraction(0.5, 1.0), "momentum"),
        (lambda: theory.repeated_contraction(0.5, 0), "rounds"),
        (lambda: theory.Smoothness(1.0, ()), "L_i"),
        (lambda: theory.Smoothness(1.0, (1.0, math.nan)), r"L_i\[1\]"),
        (lambda: theory.least_squares([np.eye(2), np.eye(3)]), r"features\[1\]"),
        (lambda: theory.logistic_regression([]), "features"),
        (lambda: theory.logistic_regression([np.eye(2)], l2=-1.0), "l2"),
        (lambda: theory.ef21_step(theory.Smoothness(1.0, (1.0,)), 0.5, mean="GM"), "mean"),
        (lambda: theory.three_point_constants("v9"), "variant"),
        (lambda: theory.three_point_constants("v3", alpha=0.5), "inner"),
        (lambda: theory.rare_feature_count([np.zeros((2, 2))]), "features"),
        (lambda: theory.rare_features_step(theory.Smoothness(1.0, (1.0,)), 0.5, 2), "shared_by"),
        (lambda: theory.diana_step(theory.Smoothness(1.0, (1.0,)), 1.0, rule="min"), "rule"),
        (lambda: theory.curvature(lambda x: x**2, 1.0, iterations=0), "iterations"),
        (
            lambda: theory.ef21_partial_participation_step(
                theory.Smoothness(1.0, (1.0,)), 0.01, 0.5, rho=1.0, s=1.0
            ),
            "rho",
        ),
    ],
)
def test_bad_input_is_named(call, name: str):
    with pytest.raises(ValueError, match=name):
        call()


def test_rate_factor_and_batch() -> None:
    """A reduction by 2 belongs to alpha = 3/4, one by 5 to 0.36; the batch is sigma^2/(a t)^2."""
    assert theory.rate_factor(0.75) == 0.5
    np.testing.assert_allclose(theory.rate_factor(0.36), 0.2)
    constants = theory.Smoothness(L=2.0, L_i=(1.0, 3.0))
    expected = theory.ef21_step(constants, 0.3, mean="QM") / theory.ef21_step(constants, 1.0)
    np.testing.assert_allclose(theory.rate_factor(0.3, constants), expected)
    assert theory.ef21_batch(0.5, sigma=2.0, tolerance=1.0) == 16
    assert theory.ef21_batch(1.0, sigma=0.0, tolerance=1.0) == 1


def test_marina_step_by_hand() -> None:
    """With omega = 4 on 4 workers the variance is 1, and (1 - p)/p = 3 for p = 1/4, 0 for p = 1."""
    c = theory.Smoothness(L=2.0, L_i=(2.0,) * 4)
    assert theory.marina_step(c, 4.0, 0.25) == pytest.approx(1 / (2 + 2 * math.sqrt(3)))
    assert theory.marina_step(c, 4.0, 1.0) == 1 / 2
