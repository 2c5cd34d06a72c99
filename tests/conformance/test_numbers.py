"""Numbers of the papers for single vectors: reconstructions, errors, probabilities, constants."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conformance.adapter import EfOptax


@pytest.fixture(scope="module")
def library() -> EfOptax:
    return EfOptax()


def error(y, x) -> float:
    return float(np.sum((np.asarray(y, np.float64) - np.asarray(x)) ** 2))


def test_scaled_sign(library: EfOptax) -> None:
    """(3, -1, 2, 1): 1.75 signs, error 15 - 49/4, phi = 49/60; a zero counts as plus."""
    x = [3.0, -1.0, 2.0, 1.0]
    y = library.compress("scaled_sign", x)
    assert y.tolist() == [1.75, -1.75, 1.75, 1.75]
    assert error(y, x) == 2.75 and 1 - error(y, x) / 15 == pytest.approx(49 / 60)
    x = [3.0, -1.0, 2.0, 0.0]
    assert error(library.compress("scaled_sign", x), x) == 5.0


def test_two_means(library: EfOptax) -> None:
    x = [3.0, -1.0, 2.0, 1.0]
    y = library.compress("two_mean_sign", x)
    assert y.tolist() == [2, -1, 2, 2] and error(y, x) == 2.0


def test_rms_sign(library: EfOptax) -> None:
    x = [3.0, -1.0, 2.0, 1.0]
    assert error(library.compress("rms_sign", x), x) == pytest.approx(2.8891165765480817, rel=1e-6)


def test_natural_compression(library: EfOptax) -> None:
    """2.5 goes down with probability 3/4, -2.75 with .625; powers of two are kept."""
    y = library.draws("natural", [2.5, -2.75, 4.0, -0.25], 20_000, key=0)
    assert set(np.unique(y[:, 0])) == {2, 4} and set(np.unique(y[:, 1])) == {-4, -2}
    assert np.mean(y[:, 0] == 2) == pytest.approx(0.75, abs=0.015)
    assert np.mean(y[:, 1] == -2) == pytest.approx(0.625, abs=0.018)
    assert (y[:, 2] == 4).all() and (y[:, 3] == -0.25).all()


@pytest.mark.parametrize(("t", "second"), [(1.0, 1.0), (4 / 3, 9 / 8), (1.5, 10 / 9), (1.8, None)])
def test_natural_second_moment(library: EfOptax, t: float, second: float | None) -> None:
    """E C(t)^2/t^2 = (3t - 2)/t^2 on [1, 2], at most 9/8."""
    y = library.draws("natural", [t], 20_000, key=0)
    moment = np.mean(y**2) / t**2
    assert moment == pytest.approx((3 * t - 2) / t**2, rel=0.01) and moment < 9 / 8 + 0.01
    if second is not None:
        assert (3 * t - 2) / t**2 == pytest.approx(second)
    assert library.constants("natural", 7, key=0)[1] == 1 / 8


def test_constants_by_hand(library: EfOptax) -> None:
    assert library.constants("qsgd", 100, states=4, key=0)[1] == 2.5  # min(6.25, 2.5)
    assert library.constants("random_k", 10, k=2, key=0, scaled=True) == (None, 4.0)
    assert library.constants("random_k", 10, k=2, key=0) == (0.2, None)
    assert library.constants("ternary", 4, key=0)[1] == 0.5


def test_scaled_random_k_made_contractive(library: EfOptax) -> None:
    """C/(1 + omega) has alpha = k/d: the mean error of draws / 5 is .8 ||x||^2."""
    x = np.arange(1.0, 11)
    y = library.draws("random_k", x, 4000, k=2, key=0, scaled=True) / 5
    ratios = np.sum((y - x) ** 2, axis=1) / np.sum(x**2)
    assert ratios.mean() == pytest.approx(0.8, abs=5 * ratios.std() / np.sqrt(4000))


def test_ternary_second_moment(library: EfOptax) -> None:
    """E||Q||^2 = norminf norm1: 1.5 ||x||^2 at (1, 1/3, 1/3, 1/3)."""
    x = np.asarray([1.0, 1 / 3, 1 / 3, 1 / 3])
    y = library.draws("ternary", x, 20_000, key=0)
    assert np.mean(np.sum(y**2, axis=1)) / np.sum(x**2) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(("scale", "limit"), [("mse", 0.3631), ("unbiased", 0.5701)])
def test_drive_on_normal_vectors(library: EfOptax, scale: str, limit: float) -> None:
    """Mean squared error of signs with a fitted scale, d = 4096: 1 - 2/pi and pi/2 - 1."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        x = rng.standard_normal(4096)
        ratios.append(error(library.fitted_signs(x, scale), x) / np.sum(x**2))
    assert np.mean(ratios) == pytest.approx(limit, abs=0.003)
