"""More cases that other systems' tests assert, or that break in those systems: the compressors."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.conformance.adapter import EfOptax


@pytest.fixture(scope="module")
def library() -> EfOptax:
    return EfOptax()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("side", [64, 48, 7])
def test_02_chunked_cosines_with_all_coefficients(library: EfOptax, side: int) -> None:
    """k = all is the identity, also if the sides have no common chunk size."""
    x = normal(side, 50)
    np.testing.assert_allclose(library.compress("dct_top_k", x, chunk=64, k=4096), x, atol=1e-5)


def test_04_two_bits_with_a_threshold(library: EfOptax) -> None:
    sent, owed = library.feedback("two_bit", np.float32([[0.1], [0.4]]), threshold=0.5)
    assert [float(s[0]) for s in sent] == [0.0, 0.5] and float(owed[1][0]) == 0.0
    sent, owed = library.feedback("two_bit", np.float32([[-0.1], [-0.4]]), threshold=0.5)
    assert [float(s[0]) for s in sent] == [0.0, -0.5] and float(owed[1][0]) == 0.0
    assert library.message_bits("two_bit", 33) == 66  # 16 codes a word: three words on the wire


def test_04_one_bit_with_a_threshold(library: EfOptax) -> None:
    sent, owed = library.feedback("threshold_sign", np.float32([[0.75], [0.25]]), threshold=0.5)
    assert [float(s[0]) for s in sent] == [1.0, -1.0]
    assert [float(e[0]) for e in owed] == [-0.25, 1.0]
    assert library.message_bits("threshold_sign", 33) == 33  # 32 codes a word: two words


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def test_05_one_bit_with_scaling_both_ways(library: EfOptax) -> None:
    """sign(0) = +1, times the mean magnitude; by the worker and again by the server."""
    rows = np.float32([[0.0, -3.0, 1.0, 2.0], [4.0, 0.0, -1.0, 0.0]])

    def compress(x):
        return np.abs(x).mean() * signs(x)

    expected = compress(np.mean([compress(row) for row in rows.astype(np.float64)], axis=0))
    np.testing.assert_allclose(library.both_ways("scaled_sign", [rows])[0], expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_06_top_k_both_ways(library: EfOptax, k: int) -> None:
    """Two steps of two workers; worker and server keep what they did not send."""
    steps = normal(2, 2, 12, seed=k)

    def top(x):
        kept = np.argsort(-np.abs(x), kind="stable")[:k]
        return np.where(np.isin(np.arange(x.size), kept), x, 0)

    e, server = np.zeros((2, 12)), np.zeros(12)
    for rows, got in zip(steps, library.both_ways("top_k", steps, k=k), strict=True):
        p = rows + e
        c = np.stack([top(row) for row in p])
        e, total = p - c, c.mean(0) + server
        out = top(total)
        server = total - out
        np.testing.assert_allclose(got, out, atol=1e-6)


def test_07_two_phase_one_bit(library: EfOptax) -> None:
    """Scale norm2/sqrt(n) of each chunk, by the worker and by the chunk's server; a - c is kept."""
    steps = normal(3, 2, 8, seed=7)
    steps[0, 0, :3] = 0

    def compress(x):
        return np.linalg.norm(x) / np.sqrt(x.size) * signs(x)

    def by_chunk(x):
        return np.concatenate([compress(x[:4]), compress(x[4:])])

    e, server = np.zeros((2, 8)), np.zeros(8)
    for rows, got, memory in zip(steps, *library.two_phase("rms_sign", steps), strict=True):
        a = rows + e
        c = np.stack([by_chunk(row) for row in a])
        e, total = a - c, c.mean(0) + server
        out = by_chunk(total)
        server = total - out
        np.testing.assert_allclose(got, out, atol=1e-6)
        np.testing.assert_allclose(memory, e, atol=1e-6)


def test_08_power_sgd_returns_and_remembers_everything(library: EfOptax) -> None:
    """In double precision, rank 2, three iterations: original = returned + residual."""
    with jax.enable_x64(True):
        steps = np.random.default_rng(8).standard_normal((3, 40, 30))
        sent, owed = library.feedback("power_sgd", steps, rank=2, iterations=3)
        carried = np.zeros((40, 30))
        for g, c, e in zip(steps, sent, owed, strict=True):
            assert c.dtype == np.float64 and np.linalg.matrix_rank(c, tol=1e-8) == 2
            np.testing.assert_allclose(c + e, g + carried, atol=1e-13)
            carried = e


def test_09_power_sgd_really_compresses_and_zero_layers_stay_finite(library: EfOptax) -> None:
    assert library.message_bits("power_sgd", (100, 50), rank=2) == 32 * 2 * 150
    sent, owed = library.feedback(
        "power_sgd", [np.zeros((6, 5), np.float32), normal(6, 5)] * 2, rank=1
    )
    assert all(np.isfinite(x).all() for x in (*sent, *owed))
    assert (sent[0] == 0).all() and np.abs(sent[1]).max() > 0


def test_10_bits_of_arithmetic_coding(library: EfOptax) -> None:
    assert library.arithmetic_bits([1, 2, 3, 4, 5]) == pytest.approx(89.82311, abs=2e-5)


def test_11_drive_without_rotation(library: EfOptax) -> None:
    expected = [7 / 3, -7 / 3, 7 / 3]
    np.testing.assert_allclose(library.fitted_signs([1, -2, 3], "unbiased"), expected, rtol=1e-6)
    assert (library.fitted_signs([0, 0, 0], "unbiased") == 0).all()
    assert (library.compress("drive", np.zeros(9), key=0) == 0).all()


def test_12_ternary_clipping(library: EfOptax) -> None:
    x = np.zeros(100)
    x[[10, 60]] = 100, -100
    y = library.compress("ternary", x, key=0, clip_sigmas=2.5)
    np.testing.assert_allclose(y[[10, 60]], [35.355339, -35.355339], rtol=1e-6)
    assert np.count_nonzero(y) == 2
    assert library.compress("ternary", [0, 2, 2], key=0, clip_sigmas=2.5).tolist() == [0, 2, 2]


def test_13_two_means_of_two_workers(library: EfOptax) -> None:
    mean = library.mean_of_workers("two_mean_sign", [[0, 2, -1]] * 2)
    assert (2 * mean).tolist() == [2, 2, -2]
    assert library.message_bits("two_mean_sign", 3) == 3 + 64


def test_14_qsgd_of_two_workers(library: EfOptax) -> None:
    """(2, 3, 6) has norm 7: with seven levels nothing is rounded."""
    mean = library.mean_of_workers("qsgd", [[2, 3, 6]] * 2, states=7, key=0)
    assert (2 * mean).tolist() == [4, 6, 12]


def test_18_two_means(library: EfOptax) -> None:
    assert library.compress("two_mean_sign", [-1, -3, 2, 4]).tolist() == [-2, -2, 3, 3]


def test_20_power_sgd_of_a_zero_gradient(library: EfOptax) -> None:
    sent, owed = library.feedback("power_sgd", [np.zeros((5, 4), np.float32)] * 2, rank=2)
    assert all((x == 0).all() for x in (*sent, *owed))


@pytest.mark.parametrize("name", ["dct_top_k", "svd", "power_sgd", "two_mean_sign"])
def test_25_a_convolution_of_four_axes(library: EfOptax, name: str) -> None:
    options = {
        "dct_top_k": {"chunk": 64, "k": 8},
        "svd": {"rank": 1},
        "power_sgd": {"rank": 1},
        "two_mean_sign": {"columns": True},
    }[name]
    x = normal(3, 3, 4, 6)
    y = library.compress(name, x, **options)
    assert y.shape == x.shape and 0 < np.sum((y - x) ** 2) < np.sum(x**2)


def test_26_what_is_always_zero_stays_exactly_zero(library: EfOptax) -> None:
    """Columns without any gradient, under one-bit codes with memory and one scale per column."""
    steps = normal(4, 6, 5)
    steps[:, :, [1, 3]] = 0
    sent, owed = library.feedback("two_mean_sign", steps, columns=True)
    for x in (*sent, *owed):
        assert (x[:, [1, 3]] == 0).all() and (x[:, 0] != 0).any()
