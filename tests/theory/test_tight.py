"""The tight rates: attained by the worst compressor, exceeded by none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ef_optax import theory

L, MU = 1.0, 0.1
Compressor = Callable[[np.ndarray], np.ndarray]


def ef14(H: np.ndarray, step: float, C: Compressor, x: np.ndarray, steps: int) -> list[float]:
    """V after every step on f = x'Hx/2 with error feedback in step units."""
    q, e, seen = math.sqrt(1 - ALPHA), np.zeros_like(x), []
    for _ in range(steps):
        seen.append(float(np.sum((x - e) ** 2) + np.sum(e**2) / q))
        p = e + step * H @ x
        sent = C(p)
        x, e = x - sent, p - sent
    return seen


def ef21(H: np.ndarray, step: float, C: Compressor, x: np.ndarray, steps: int) -> list[float]:
    """V after every step with EF21, which starts from the first gradient."""
    q, g, seen = math.sqrt(1 - ALPHA), H @ x, []
    for _ in range(steps):
        seen.append(float(np.sum((g - H @ x) ** 2) + q * np.sum((H @ x) ** 2)))
        x = x - step * g
        g = g + C(H @ x - g)
    return seen


def cgd(H: np.ndarray, step: float, C: Compressor, x: np.ndarray, steps: int) -> list[float]:
    """f after every step of compressed gradient descent."""
    seen = []
    for _ in range(steps):
        seen.append(float(x @ H @ x / 2))
        x = x - step * C(H @ x)
    return seen


ALPHA = 0.25
METHODS = {
    "ef14": (ef14, theory.tight_step, theory.tight_rate),
    "ef21": (ef21, theory.tight_step, theory.tight_rate),
    "cgd": (cgd, theory.cgd_step, theory.cgd_rate),
}


def top_1(p: np.ndarray) -> np.ndarray:
    return np.where(np.arange(p.size) == np.argmax(np.abs(p)), p, 0)


@pytest.mark.parametrize("method", METHODS)
def test_no_compressor_is_worse_than_the_rate(method: str) -> None:
    """V shrinks by at least the rate in every single step, with top-1 of four."""
    run, step, rate = METHODS[method]
    rng = np.random.default_rng(0)
    for _ in range(20):
        U = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        H = U @ np.diag([MU, *rng.uniform(MU, L, 2), L]) @ U.T
        V = np.asarray(run(H, step(ALPHA, L, MU), top_1, rng.normal(size=4), 300))
        assert np.all(V[1:] <= rate(ALPHA, L, MU) * V[:-1] * (1 + 1e-12))


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_is_attained(method: str) -> None:
    """The longest vector that a compressor of this alpha may make of a number is the worst."""
    run, step, rate = METHODS[method]
    q = math.sqrt(1 - ALPHA)
    V = run(np.eye(1) * L, step(ALPHA, L, MU), lambda p: (1 + q) * p, np.ones(1), 400)
    assert V[-1] / V[-2] == pytest.approx(rate(ALPHA, L, MU), rel=1e-9)


def test_known_values_and_limits() -> None:
    assert theory.tight_rate(0.25, L, MU) == pytest.approx(0.97422, abs=5e-6)
    assert theory.tight_rate(0.10, L, MU) == pytest.approx(0.99047, abs=5e-6)
    descent = ((L - MU) / (L + MU)) ** 2
    for rate, step in (theory.tight_rate, theory.tight_step), (theory.cgd_rate, theory.cgd_step):
        assert rate(1.0, L, MU) == pytest.approx(descent, rel=1e-12)
        assert step(1.0, L, MU) == pytest.approx(2 / (L + MU), rel=1e-12)
    for alpha in np.geomspace(1e-4, 0.999, 20):
        for mu in (1e-3, 0.5, L):
            assert theory.cgd_rate(alpha, L, mu) <= theory.tight_rate(alpha, L, mu) < 1


def test_a_constant_of_convexity_above_that_of_smoothness_is_refused() -> None:
    with pytest.raises(ValueError, match="mu=2.0 must be at most L=1.0"):
        theory.tight_step(0.5, 1.0, 2.0)
