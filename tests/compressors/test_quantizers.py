"""Deterministic quantisers against NumPy and against the constants they claim to attain."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.quantize.block_quantize import block_quantize
from ef_optax.compressors.quantize.fp8 import fp8
from ef_optax.compressors.quantize.log_quantize import log_quantize
from ef_optax.compressors.quantize.quantile_8bit import quantile_8bit
from ef_optax.compressors.quantize.quantile_sketch import quantile_sketch
from ef_optax.compressors.quantize.scaled_half import scaled_half
from ef_optax.compressors.quantize.sigma_bins import sigma_bins
from ef_optax.compressors.quantize.uniform import uniform
from ef_optax.compressors.sparse.top_k import top_k
from tests.compressors import coding


def decoded(compressor, x, dtype="float32") -> np.ndarray:
    """What the receivers see."""
    return coding.decoded(compressor, x, dtype=dtype).astype(np.float64)


def contraction(compressor, x) -> float:
    """1 - ||C(x) - x||^2 / ||x||^2."""
    x = np.asarray(x, np.float64)
    return float(1 - np.sum((decoded(compressor, x) - x) ** 2) / np.sum(x**2))


def test_uniform_by_hand() -> None:
    """Steps of 5/7 from -1; buckets of four have their own ends; constant buckets are exact."""
    x = np.asarray([-1.0, 0.0, 4.0, 0.3, 2.5, 2.5, 2.5])
    step = 5 / 7
    expected = [-1 + step * round((v + 1) / step) for v in x[:4]] + [2.5] * 3
    np.testing.assert_allclose(decoded(uniform(3, bucket=4), x), expected, rtol=1e-6)
    assert uniform(3, bucket=4).bits(7) == 2 * 64 + 7 * 3


def test_uniform_attains_its_error() -> None:
    x = [1.0, -1.0] + [0.0] * 6
    assert uniform(2).codec.alpha(8) == pytest.approx(1 - 6 / 18)
    assert contraction(uniform(2), x) == pytest.approx(1 - 6 / 18, rel=1e-6)


def test_block_quantize_by_hand() -> None:
    """Multiples of M/3, ties to even multiples, zero kept; one block has another M."""
    x = [3.0, 1.5, -0.4, 0.0, 100.0, -40.0]
    np.testing.assert_allclose(
        decoded(block_quantize(3, block=4), x), [3, 2, 0, 0, 100, -100 / 3], rtol=1e-6
    )


def test_block_quantize_attains_its_alpha() -> None:
    """All but the largest at half a step round to zero (ties to even)."""
    x = [1.0] + [0.5] * 8
    assert block_quantize(2, block=None).codec.alpha(9) == pytest.approx(1 / 3)
    assert contraction(block_quantize(2, block=None), x) == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", [5, 300, 1000])
def test_quantile_8bit_against_numpy(size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    borders = np.quantile(x, np.linspace(0, 1, 257))[1:-1].astype(np.float32)
    code = np.searchsorted(borders, x, side="left")
    means = [x[code == c].mean() if (code == c).any() else 0 for c in range(256)]
    np.testing.assert_allclose(decoded(quantile_8bit(), x), np.asarray(means)[code], rtol=1e-5)


def test_quantile_sketch_closes_bins_below() -> None:
    """The median of (0, 1, 2) is 1 and opens the upper bin."""
    assert decoded(quantile_sketch(2), [0, 1, 2]).tolist() == [0, 1.5, 1.5]


def test_sigma_bins_against_numpy() -> None:
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    y = (x - x.mean()) / (6 * x.std(ddof=1) / 4) + 2
    code = np.clip(np.round(y), 0, 3).astype(int)
    means = np.asarray([x[code == c].mean() for c in range(4)])
    np.testing.assert_allclose(decoded(sigma_bins(2), x), means[code], rtol=1e-5)


def test_means_shorten() -> None:
    """A codebook of means is a projection: C(C(x)) = C(x), and the error is orthogonal to it."""
    x = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    for compressor in (quantile_sketch(6), sigma_bins(3)):
        y = decoded(compressor, x)
        assert abs(np.dot(y, x - y)) < 1e-4
        assert np.sum(y**2) < np.sum(x**2)


def test_scaled_half_survives_the_range() -> None:
    """Rows far apart in size keep eleven significant bits of their spread."""
    x = np.random.default_rng(2).standard_normal((3, 40)) * np.asarray([[1e-30], [1.0], [1e30]])
    error = np.abs(decoded(scaled_half(), x) - x.astype(np.float32))
    spread = np.std(x, axis=1, keepdims=True)
    assert (error <= 2.0**-11 * (np.abs(x) + 3 * spread)).all()
    assert scaled_half().bits((3, 40)) == 16 * 120 + 64 * 3


def test_fp8_by_hand() -> None:
    """448 is the largest e4m3; 17 is between 16 and 18 and goes to the even mantissa, 16."""
    np.testing.assert_allclose(decoded(fp8(), [448, 17, -19, 2.0**-10]), [448, 16, -20, 0])
    np.testing.assert_allclose(decoded(fp8("e5m2"), [57344, 9, 3 * 2.0**-18]), [57344, 8, 2.0**-16])


def test_fp8_rows_have_their_own_scale() -> None:
    x = [[1e-6, 2e-6], [1.0, 1e6]]
    np.testing.assert_allclose(decoded(fp8(), x)[0], x[0], rtol=1e-6)
    assert decoded(fp8(rows=False), x)[0].tolist() == [0, 0]
    assert fp8().bits((2, 2)) == 32 + 64 and fp8(rows=False).bits((2, 2)) == 32 + 32


def test_log_quantize_by_hand() -> None:
    """sqrt 2 is the border between 1 and 2; three powers below the largest, then zero."""
    x = [1.41, 1.42, -0.7, 0.36, 0.35, 0.0]
    assert decoded(log_quantize(2), x).tolist() == [1, 2, -0.5, 0.5, 0, 0]
    assert log_quantize(2).bits(6) == 6 * 3 + 32


@pytest.mark.parametrize("compressor", [uniform(4), block_quantize(4), fp8(), sigma_bins(4)])
def test_bfloat16_leaves(compressor) -> None:
    x = np.asarray([1.0, -0.5, 0.25, 3.0])
    assert np.max(np.abs(decoded(compressor, x, "bfloat16") - x)) < 0.3


def test_values_of_two_bits_inside_top_k() -> None:
    """12 bits of index, 2 of value: a factor of 186 with float32 centroids at top-1% of 4096."""
    compressor = compose(sigma_bins(2), top_k(0.01))
    assert compressor.bits((4096,)) == 41 * 14 + 4 * 32
    x = np.random.default_rng(3).standard_normal(4096)
    y = decoded(compressor, x)
    assert np.count_nonzero(y) == 41 and len(np.unique(y)) <= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform(0), "bits=0"),
        (lambda: uniform(4, bucket=-1), "bucket=-1"),
        (lambda: block_quantize(1), "bits=1"),
        (lambda: quantile_sketch(1), "quantiles=1"),
        (lambda: sigma_bins(2, sigmas=0), "sigmas=0"),
        (lambda: fp8("e3m4"), "format='e3m4'"),
        (lambda: log_quantize(9), "bits=9"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def inceptionn_oracle(x: np.ndarray, e: int, room: int) -> tuple[np.ndarray, int, int]:
    """C(x), the bytes of all payloads, and the payloads that fit, value by value."""
    h, size = e // 2, np.abs(x)
    tags = np.select([size >= 1, size >= 2.0**-h, size >= 2.0**-e], [3, 2, 1], 0)
    steps = np.select([tags == 2, tags == 1], [2.0**15, 2.0 ** (h + 7)], 1)
    value = np.where(tags == 3, x, np.sign(x) * np.floor(size * steps) / steps)
    lengths = np.asarray([0, 1, 2, 4])[tags]
    out, used = np.zeros(x.size), 0
    for i in np.argsort(-size, kind="stable"):  # the largest first, until one does not fit
        if used + lengths[i] > room:
            break
        out[i], used = value[i], used + lengths[i]
    return out, int(lengths.sum()), int(used)


@pytest.mark.parametrize("capacity", [1.0, pytest.param(0.2, marks=pytest.mark.slow), 0.01])
def test_inceptionn_against_numpy(capacity: float) -> None:
    """All four kinds of value; those that do not fit, the smallest, are counted and kept."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal(200) * 2.0 ** rng.integers(-14, 3, 200))
    x[:8] = [1, -1, 0.5, 2.0**-5, 2.0**-10, 0, -0.0, -(2.0**-11)]
    x[50:150:3] = 0.75  # ties, some of which do not fit
    codec = ef.inceptionn(2.0**-10, capacity=capacity).codec
    message = jax.jit(codec.encode)(jnp.asarray(x))
    expected, wanted, used = inceptionn_oracle(x.astype(np.float64), 10, math.ceil(800 * capacity))
    like = jax.ShapeDtypeStruct((200,), jnp.float32)
    got = jax.jit(lambda message: codec.decode(message, like))(message)
    np.testing.assert_array_equal(got, expected)
    assert int(codec.information(message)) == 400 + 8 * wanted
    assert int(codec.overflow(message)) == wanted - used
    assert codec.bits(200) == 32 + 400 + 8 * math.ceil(800 * capacity)
    if capacity == 1.0:
        assert wanted == used and np.abs(expected - x).max() < 2.0**-10


def test_inceptionn_serves_what_waited() -> None:
    """If one whole value fits in a step, error feedback sends all of them in turn."""
    tx = ef.error_feedback(ef.inceptionn(2.0**-4, capacity=0.25))
    update, total = jax.jit(tx.update), np.zeros(4)
    state, g = tx.init(jnp.zeros(4)), np.asarray([0.5, 0.25, 0.5, 0.25], np.float32)
    for _ in range(40):
        out, state = update(g, state)
        total += np.asarray(out)
    np.testing.assert_allclose(total + np.asarray(state.residual), 40 * np.asarray([0.5, 0.25] * 2))
    assert np.abs(np.asarray(state.residual)).max() < 8


@pytest.mark.parametrize("bound", [0.3, 2.0**-15, 1, None])
def test_inceptionn_refuses_other_bounds(bound) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ef.inceptionn(bound)
