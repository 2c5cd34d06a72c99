"""Stochastic quantisers against the numbers of their papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax.compressors.quantize.dorefa import dorefa
from ef_optax.compressors.quantize.linear_dithering import linear_dithering
from ef_optax.compressors.quantize.natural import natural
from ef_optax.compressors.quantize.natural_dithering import natural_dithering
from ef_optax.compressors.quantize.qsgd import qsgd
from ef_optax.compressors.quantize.ternary import ternary
from ef_optax.compressors.quantize.three_lc import three_lc

DRAWS = 20_000


def draws(compressor, x: list[float], count: int = DRAWS) -> np.ndarray:
    """C(x) for many keys, as float64."""
    x, codec = jnp.asarray(x, jnp.float32), compressor.codec
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    one = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))
    return np.asarray(one(jax.random.split(jax.random.key(0), count)), np.float64)


def decoded(compressor, x: list[float]) -> np.ndarray:
    """C(x) of a deterministic codec, or one draw."""
    return draws(compressor, x, 1)[0]


def variance(compressor, x: list[float]) -> float:
    """E||C(x) - x||^2 / ||x||^2, estimated."""
    error = draws(compressor, x) - np.asarray(x)
    return float(np.mean(np.sum(error**2, axis=1)) / np.sum(np.square(x)))


@pytest.mark.parametrize("levels", [1, 3, 4, 7, 8])
def test_the_largest_level_of_either_sign_has_a_code_of_its_own(levels: int) -> None:
    """2 s + 1 codes, which take one bit more from s = 4 and s = 8 on."""
    x = [1.0, -1.0, 0.0, 1.0, -1.0]
    assert decoded(qsgd(levels, key=0, norm="linf"), x).tolist() == x


def test_qsgd_is_exact_on_its_levels() -> None:
    """Two workers with (2, 3, 6), norm 7, 7 levels: the sum is exactly (4, 6, 12)."""
    assert decoded(qsgd(7, 0), [2, 3, 6]).tolist() == [2, 3, 6]
    assert decoded(qsgd(7, 1), [2, 3, 6]).tolist() == [2, 3, 6]


def test_qsgd_variance_formula() -> None:
    """Bernoulli rounding: the variance of a value is (N/s)^2 f (1 - f), f the fraction."""
    x, s = np.asarray([0.3, -1.2, 0.7, 2.1]), 4
    norm = np.linalg.norm(x)
    fraction = np.abs(x) / norm * s % 1
    expected = (norm / s) ** 2 * fraction * (1 - fraction)
    np.testing.assert_allclose(draws(qsgd(s, 0), x.tolist()).var(0), expected, rtol=0.05)
    assert qsgd(4, 0).codec.omega(100) == 2.5


def test_buckets_have_their_own_norm() -> None:
    x = [3.0, 4.0, 0.0, 0.0, 1e-3]
    y = decoded(qsgd(5, 0, bucket=2), x)
    assert y.tolist() == np.float32(x).tolist()
    assert qsgd(5, 0, bucket=2).bits(5) == 3 * 32 + 5 * 4


def test_natural_dithering_levels() -> None:
    """A ratio of 3/8 is 1/4 or 1/2, each with probability 1/2; below 1/8 it is 0 or 1/8."""
    y = draws(natural_dithering(4, 0, norm="linf"), [8.0, 3.0, -0.5, 0.0])
    assert set(np.unique(y[:, 1])) == {2.0, 4.0}
    assert set(np.unique(y[:, 2])) == {-1.0, 0.0}
    assert abs(np.mean(y[:, 1] == 2.0) - 0.5) < 0.02 and abs(np.mean(y[:, 2]) + 0.5) < 0.02
    assert (y[:, 0] == 8).all() and (y[:, 3] == 0).all()


@pytest.mark.parametrize(("bits", "spread"), [(1, 1.0), (3, 1 / 7)])
def test_dorefa_has_no_zero(bits: int, spread: float) -> None:
    """In a spike the zeros are +-M/L with mean zero, and omega = (d - 1)/L^2 is attained."""
    x = [0.0, 2.0, 0.0, 0.0]
    y = draws(dorefa(bits, 0), x)
    np.testing.assert_allclose(np.unique(np.abs(y[:, 0])), [2 * spread], rtol=1e-6)
    omega = dorefa(bits, 0).codec.omega(4)
    assert variance(dorefa(bits, 0), x) == pytest.approx(omega, rel=1e-5)


def test_natural_probabilities() -> None:
    """2.5 is 2 with probability 3/4, -2.75 is -2 with probability 5/8; powers of two are kept."""
    y = draws(natural(0), [2.5, -2.75, 4.0, 0.0, -0.0])
    assert set(np.unique(y[:, 0])) == {2.0, 4.0} and set(np.unique(y[:, 1])) == {-4.0, -2.0}
    assert abs(np.mean(y[:, 0] == 2) - 0.75) < 0.015 and abs(np.mean(y[:, 1] == -2) - 0.625) < 0.015
    assert (y[:, 2] == 4).all() and (y[:, 3:] == 0).all()


def test_natural_attains_its_omega() -> None:
    assert variance(natural(0), [4 / 3]) == pytest.approx(1 / 8, rel=0.02)
    assert variance(natural(0), [1.5]) < 1 / 8


def test_natural_at_the_ends_of_the_range() -> None:
    """The largest exponent is kept; denormal numbers become 0 or the smallest normal number."""
    top, least = np.float32(3e38), np.finfo(np.float32).tiny
    y = draws(natural(0), [top, float(np.float32(2.0**-128))])
    assert (y[:, 0] == 2.0**127).all()
    assert set(np.unique(y[:, 1])) <= {0.0, float(least)}
    assert abs(np.mean(y[:, 1] > 0) - 0.25) < 0.015


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_natural_of_narrow_floats(dtype: str) -> None:
    x = jnp.asarray([1.5, -3.0, 0.25], dtype)
    codec = natural(0).codec
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    keys = jax.random.split(jax.random.key(2), 2000)
    y = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))(keys)
    y = np.asarray(y, np.float64)
    assert set(np.unique(y[:, 0])) == {1.0, 2.0} and set(np.unique(y[:, 1])) == {-4.0, -2.0}
    assert abs(y[:, 0].mean() - 1.5) < 0.06 and (y[:, 2] == 0.25).all()
    assert codec.bits(3, dtype) == 3 * (9 if dtype == "bfloat16" else 6)


def test_ternary_attains_its_omega() -> None:
    """E||C(x)||^2 = M norm1, 1.5 ||x||^2 at (1, 1/3, 1/3, 1/3)."""
    assert ternary(0).codec.omega(4) == 0.5
    for compressor in (ternary(0), linear_dithering(1, 0)):
        assert variance(compressor, [1, 1 / 3, 1 / 3, 1 / 3]) == pytest.approx(0.5, rel=0.03)


def test_ternary_clipping() -> None:
    """2.5 standard deviations of 98 zeros and two spikes of 100 are 35.355339."""
    x = [0.0] * 98 + [100.0, -100.0]
    y = decoded(ternary(0, clip_sigmas=2.5), x)
    np.testing.assert_allclose(y[98:], [35.355339, -35.355339], rtol=1e-6)
    assert (y[:98] == 0).all()
    assert decoded(ternary(0, clip_sigmas=2.5), [0, 2, 2]).tolist() == [0, 2, 2]


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_quartic_and_bits_agree(count: int) -> None:
    x = np.random.default_rng(count).standard_normal(count).tolist()
    a, b = ternary(3), ternary(3, packing="quartic")
    assert decoded(a, x).tolist() == decoded(b, x).tolist()
    assert b.bits(count) == 32 + 8 * -(-count // 5)


def test_three_lc_sends_above_half_of_its_step() -> None:
    """S = 1.5 * 2 = 3: a value is sent iff it is above 1.5, the tie is not."""
    assert decoded(three_lc(1.5), [2.0, -1.6, 1.5, 0.1]).tolist() == [3, -3, 0, 0]


def test_three_lc_attains_its_alpha() -> None:
    s, d = 1.5, 6
    x = np.asarray([1.0] + [s / 2] * (d - 1))
    error = decoded(three_lc(s), x.tolist()) - x
    alpha = three_lc(s).codec.alpha(d)
    assert 1 - np.sum(error**2) / np.sum(x**2) == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qsgd(0, 0), "states=0"),
        (lambda: qsgd(4, 0, norm="l1"), "norm='l1'"),
        (lambda: qsgd(4, 0, bucket=0), "bucket=0"),
        (lambda: natural_dithering(200, 0), "at most 126"),
        (lambda: dorefa(17, 0), "bits=17"),
        (lambda: ternary(0, clip_sigmas=-1), "clip_sigmas=-1"),
        (lambda: ternary(0, packing="bytes"), "packing='bytes'"),
        (lambda: three_lc(2.0), "sparsity=2.0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: qsgd(4), natural, ternary, lambda: dorefa(2)])
def test_a_key_is_needed(make) -> None:
    with pytest.raises(TypeError, match=r"key=None.*jax\.random\.key"):
        make()
