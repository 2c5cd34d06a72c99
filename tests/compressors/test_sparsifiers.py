"""Sparsifiers by hand, against NumPy, and what they keep beyond their capacity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.quantize.adaq import adaq
from ef_optax.compressors.quantize.cast import cast
from ef_optax.compressors.quantize.sigma_bins import sigma_bins
from ef_optax.compressors.sparse.bernoulli import bernoulli
from ef_optax.compressors.sparse.block_top_k import block_top_k
from ef_optax.compressors.sparse.comp_k import comp_k
from ef_optax.compressors.sparse.mix_k import mix_k
from ef_optax.compressors.sparse.random_block import random_block
from ef_optax.compressors.sparse.redsync import redsync
from ef_optax.compressors.sparse.row_top_k import row_top_k
from ef_optax.compressors.sparse.sampled_top_k import sampled_top_k
from ef_optax.compressors.sparse.threshold import threshold
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.compressors.sparse.wangni import keep_probabilities, wangni
from tests.compressors.coding import coded, decoded


def drawn(compressor, x, count: int) -> np.ndarray:
    """C(x) for several keys, by one compiled function."""
    x, codec = jnp.asarray(x, jnp.float32), compressor.codec
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    one = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), like)))
    return np.asarray(one(jax.random.split(jax.random.key(0), count)))


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_block_top_k_against_numpy() -> None:
    """Ties go to the lowest index; the last block, of 2, keeps ceil(0.25 * 2) = 1."""
    x = np.round(2 * normal(42)) / 2
    expected = np.zeros_like(x)
    for start in range(0, 42, 10):
        block = x[start : start + 10]
        k = 3 if len(block) == 10 else 1
        kept = np.argsort(-np.abs(block), kind="stable")[:k]
        expected[start + kept] = block[kept]
    assert decoded(block_top_k(0.25, block=10), x).tolist() == expected.tolist()


def test_block_indices_are_short() -> None:
    """Compression factors of top-1% in blocks of 4,096."""
    dense, size = 32 * 2**20, 2**20
    top = block_top_k(0.01)
    assert dense / top.bits(size) > 72
    assert dense / compose(cast("bfloat16"), top).bits(size) > 110
    assert dense / compose(sigma_bins(2), top).bits(size) > 220
    assert top.codec.alpha(size) == 41 / 4096


def test_a_ratio_keeps_the_next_whole_number_of_values() -> None:
    """0.3 of 7 is 2.1, so 3 are kept; 0.07 of 100 is 7 although the product of floats is more."""
    for ratio, size, kept in ((0.3, 7, 3), (0.07, 100, 7)):
        assert np.count_nonzero(decoded(top_k(ratio), normal(size, 0))) == kept


def test_threshold_counts_what_found_no_room() -> None:
    """Three values pass and two fit: the largest two are sent, not the first two."""
    x = np.asarray([0.4, 1.5, 0.5, 3.0, -0.9, -2.0, 0.0, 0.2], np.float32)
    codec = threshold(1.0, capacity=0.25).codec
    message, y, residual = coded(threshold(1.0, capacity=0.25), x)
    assert y.tolist() == [0, 0, 0, 3, 0, -2, 0, 0]
    assert int(message["passed"][0]) == 3 and int(codec.overflow(message)) == 1
    assert residual.tolist() == (x - y).tolist()


def test_threshold_is_by_magnitude() -> None:
    """Nothing below the threshold is sent, also if all values are negative."""
    codec = threshold(1.0, capacity=1.0).codec
    message, y, _ = coded(threshold(1.0, capacity=1.0), [-0.5, -2.0, -1.0, -0.9])
    assert y.tolist() == [0, -2, -1, 0] and int(codec.overflow(message)) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_top_k_is_near_its_ratio(seed: int) -> None:
    """Between .8 k and 1.3 k values, all larger than the rest."""
    x = normal(5000, seed)
    y = decoded(sampled_top_k(0.02, sample=0.05), x)
    sent = y != 0
    assert 80 <= sent.sum() <= 130
    assert np.abs(x[sent]).min() >= np.abs(x[~sent]).max()


def test_sampled_top_k_lowers_and_raises() -> None:
    """A threshold from a sample of only the small (large) values is corrected."""
    x = np.full(400, 0.001, np.float32)
    x[::10] = 1 + 0.01 * np.arange(40)  # the sample sees only these
    y = decoded(sampled_top_k(0.1, sample=0.1), x)
    assert np.count_nonzero(y) == 40 and (y[::10] > 0).all()
    x = np.ones(400, np.float32)  # everything passes: exactly k are sent, the first ones
    y = decoded(sampled_top_k(0.1, sample=0.1), x)
    assert np.flatnonzero(y).tolist() == list(range(40))


def redsync_reference(x: np.ndarray, k: int) -> np.ndarray:
    """The published bisection, then at most the 2k largest."""
    magnitude = np.abs(x)
    low, high = 0.0, 1.0
    while high - low > 0.2:
        middle = low + (high - low) / 2
        t = magnitude.mean() + middle * (magnitude.max() - magnitude.mean())
        passed = np.sum(magnitude > t)
        if k < passed < 2 * k:
            break
        if passed < k / 2:
            high = middle
        else:
            low = middle
    order = np.argsort(-magnitude, kind="stable")[: 2 * k]
    kept = [i for i in order if magnitude[i] > t]
    return np.asarray([x[i] if i in kept else 0 for i in range(len(x))])


@pytest.mark.parametrize(
    ("seed", "ratio"),
    [(2, 0.3)] + [pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 0.02), (1, 0.1)]],
)
def test_redsync_against_its_listing(seed: int, ratio: float) -> None:
    x = normal(300, seed) ** 3
    y = decoded(redsync(ratio), x)
    assert y.tolist() == redsync_reference(x, round(ratio * 300)).tolist()


def test_random_block_wraps_round() -> None:
    blocks = {tuple(sorted((start + i) % 6 for i in range(4))) for start in range(6)}
    seen = {
        tuple(np.flatnonzero(y).tolist()) for y in drawn(random_block(k=4, key=0), np.ones(6), 60)
    }
    assert seen == blocks and random_block(k=4, key=0).codec.alpha(6) == 4 / 6


def test_bernoulli_is_all_or_nothing() -> None:
    codec = bernoulli(0.25, 0).codec
    draws = drawn(bernoulli(0.25, 0), [1.0, -2.0], 30)
    assert {tuple(y.tolist()) for y in draws} == {(0.0, 0.0), (4.0, -8.0)}
    assert codec.bits((10,)) == 321


def test_wangni_probabilities() -> None:
    """Large values are certain; the others are in proportion, and the budget is used up."""
    x = np.abs(normal(200)) ** 3
    p = np.asarray(keep_probabilities(jnp.asarray(x), 0.2, 20), np.float64)
    assert p.max() == 1 and p.sum() == pytest.approx(40, rel=1e-4)
    free = p < 1
    ratio = p[free] / x[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert x[~free].min() > x[free].max()


def test_wangni_has_less_variance_than_random_k() -> None:
    x = normal(200) ** 3
    p = np.asarray(keep_probabilities(jnp.asarray(np.abs(x)), 0.2, 4), np.float64)
    variance = np.sum(x**2 * (1 / p - 1))
    assert variance < 0.5 * np.sum(x**2) * (1 / 0.2 - 1)
    keys = jax.random.split(jax.random.key(0), 3000)
    codec, like = wangni(0.2, 0, iterations=4).codec, jax.ShapeDtypeStruct((200,), jnp.float32)
    y = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(x), key), like)))(keys)
    measured = np.mean(np.sum((np.asarray(y, np.float64) - x) ** 2, axis=1))
    assert measured == pytest.approx(variance, rel=0.1)


def test_comp_k_draws_from_the_largest() -> None:
    x = np.asarray([0.1, -5.0, 3.0, 0.2, 4.0], np.float32)
    seen = set()
    for y in drawn(comp_k(1, 3, 0), x, 30):
        (place,) = np.flatnonzero(y)
        assert y[place] == 3 * x[place]
        seen.add(int(place))
    assert seen == {1, 2, 4}
    assert comp_k(2, 3, 0).codec.spread(5) == 0.5


def test_mix_k_draws_from_the_rest() -> None:
    x = np.asarray([0.1, -5.0, 3.0, 0.2, 4.0], np.float32)
    seen = set()
    for y in drawn(mix_k(2, 1, 0), x, 40):
        kept = set(np.flatnonzero(y).tolist())
        assert {1, 4} < kept and len(kept) == 3 and (y[list(kept)] == x[list(kept)]).all()
        seen |= kept - {1, 4}
    assert seen == {0, 2, 3}


def test_adaq_against_numpy() -> None:
    """The largest 30% of the positive and of the negative values become two means."""
    x = normal(101, 3)
    expected = np.zeros_like(x)
    for side in (1, -1):
        values = np.where(side * x > 0, side * x, 0)
        share = int(np.ceil(0.3 * np.sum(side * x > 0)))
        kept = np.argsort(-values, kind="stable")[:share]
        expected[kept] = side * values[kept].mean()
    np.testing.assert_allclose(decoded(adaq(0.3), x), expected, rtol=1e-6)
    assert decoded(adaq(1.0), [1.0, 3.0, -4.0]).tolist() == [2, 2, -4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block_top_k(0.1, block=0), "block=0"),
        (lambda: block_top_k(), "exactly one"),
        (lambda: threshold(0.0, capacity=0.1), "value=0.0"),
        (lambda: threshold(1.0, capacity=2.0), "capacity"),
        (lambda: sampled_top_k(0.1, sample=0), "sample"),
        (lambda: redsync(0), "redsync"),
        (lambda: bernoulli(0.0, 0), "p=0.0"),
        (lambda: wangni(0.1, 0, iterations=0), "iterations=0"),
        (lambda: comp_k(3, 2, 0), "top=2"),
        (lambda: mix_k(0, 2, 0), "k=0"),
        (lambda: adaq(1.5), "ratio=1.5"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_row_top_k_by_hand() -> None:
    """Rows of a kernel along its last axis, single values of a vector, ties to the lowest row."""
    x = np.array([[[1.0, 2.0], [0.0, -3.0]], [[2.125, 0.125], [0.5, 0.5]]], np.float32)
    found = row_top_k(k=2).update(jnp.asarray(x), row_top_k(k=2).init(x))[0]
    np.testing.assert_array_equal(found, x * np.array([[[1], [1]], [[0], [0]]]))
    assert row_top_k(0.5).bits((2, 2, 2)) == 2 * (2 * 32 + 2)
    v = jnp.array([1.0, -4.0, 3.0])
    assert row_top_k(k=1).update(v, row_top_k(k=1).init(v))[0].tolist() == [0.0, -4.0, 0.0]
