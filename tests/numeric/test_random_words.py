"""The counter-based generator of the stochastic quantisers, by simple statistics.

With z a standard normal statistic under the hypothesis of independent fair bits, every bound is
five standard deviations or more; keys are fixed, so results do not vary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax._numeric.random import mix32, random_subset, random_words, uniform_noise

COUNT = 1 << 16
SIGMAS = 5.5  # for 32 x 32 correlations


def draw(seed: int) -> np.ndarray:
    return np.asarray(random_words(jax.random.key(seed), (COUNT,)))


def signs(words: np.ndarray) -> np.ndarray:
    """The bits of each word as +-1, (COUNT, 32)."""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    return 2.0 * bits.reshape(-1, 32) - 1.0


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_every_bit_is_fair(seed: int) -> None:
    assert np.abs(signs(draw(seed)).sum(0)).max() < SIGMAS * np.sqrt(COUNT)


@pytest.mark.parametrize("lag", [0, 1, 2, 32, 512, 4096])
def test_bits_are_uncorrelated_within_a_word_and_with_later_words(lag: int) -> None:
    bits = signs(draw(3))
    product = bits[lag:].T @ bits[: COUNT - lag]
    if lag == 0:
        np.fill_diagonal(product, 0)
    assert np.abs(product).max() < SIGMAS * np.sqrt(COUNT - lag)


def test_keys_give_unrelated_words() -> None:
    first, second = signs(draw(7)), signs(draw(8))
    assert np.abs(first.T @ second).max() < SIGMAS * np.sqrt(COUNT)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(shift: int) -> None:
    """Chi square with 255 degrees of freedom."""
    counts = np.bincount((draw(4) >> shift) & 255, minlength=256)
    expected = COUNT / 256
    chi = np.sum((counts - expected) ** 2) / expected
    assert abs(chi - 255) < 5 * np.sqrt(2 * 255)


def test_noise_is_uniform() -> None:
    """The largest distance between the empirical distribution and the uniform one."""
    noise = np.sort(np.asarray(uniform_noise(jax.random.key(5), (COUNT,)), np.float64))
    assert 0.0 <= noise[0] and noise[-1] < 1.0
    gap = np.abs(noise - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert gap < 2.3 / np.sqrt(COUNT)


def test_members_of_a_random_subset_are_no_neighbours() -> None:
    """Two next to each other are members with probability k (k - 1)/(d (d - 1)), as any two."""
    d, k, draws = 64, 8, 2000
    seeds = mix32(jnp.arange(draws, dtype=jnp.uint32))
    subsets = jax.jit(jax.vmap(lambda seed: random_subset(seed, size=d, k=k)))(seeds)
    members = np.zeros((draws, d), bool)
    np.put_along_axis(members, np.asarray(subsets).astype(int), True, axis=1)
    both = np.mean(members & np.roll(members, 1, axis=1))
    assert both == pytest.approx(k * (k - 1) / (d * (d - 1)), rel=0.2)  # eight deviations
