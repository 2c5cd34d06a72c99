"""Packing against an independent oracle: one Python integer that holds all the bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ef_optax._bits import packing
from ef_optax._numeric.shapes import bits_for

# Every way of packing: no bits, whole fractions of a word, groups over several words, whole words.
# Counts: none, one, ragged ends, whole groups.
POOL = ((0, 5), (1, 100), (2, 64), (3, 33), (4, 0), (12, 9), (17, 40), (25, 65), (32, 3), (8, 1))


def oracle(codes: np.ndarray, bits: int) -> list[int]:
    stream = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words)]


@functools.cache
def compiled(bits: int, count: int):
    @jax.jit
    def both(codes):
        words = packing.pack(codes, bits)
        return words, packing.unpack(words, bits, count)

    return both


def codes_of(bits: int, count: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint32, count, elements=st.integers(0, (1 << bits) - 1))


@given(data=st.data())
@settings(max_examples=60)
def test_words_are_the_bit_stream_and_come_back(data):
    bits, count = data.draw(st.sampled_from(POOL))
    codes = data.draw(codes_of(bits, count))
    words, back = compiled(bits, count)(codes)
    assert words.dtype == back.dtype == jnp.uint32
    assert words.tolist() == oracle(codes, bits)
    assert words.shape == (packing.packed_words(count, bits),)
    assert back.tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(33))
def test_full_and_alternating_fields_of_every_width(bits):
    """The codes with most bits set, and neighbours that reveal bits leaking between fields."""
    top = (1 << bits) - 1
    codes = np.array([top, 0, top, top, 0] * 7, np.uint32)
    with jax.disable_jit():
        words = packing.pack(codes, bits)
        assert words.tolist() == oracle(codes, bits)
        assert packing.unpack(words, bits, codes.size).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [1, 6, 25])
def test_vmap_packs_each_row(bits):
    rows = np.random.default_rng(bits).integers(0, 1 << bits, (3, 70), dtype=np.uint32)
    words = jax.jit(jax.vmap(lambda row: packing.pack(row, bits)))(rows)
    assert words.tolist() == [oracle(row, bits) for row in rows]
    back = jax.jit(jax.vmap(lambda word: packing.unpack(word, bits, 70)))(words)
    assert back.tolist() == rows.tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_signs_count_both_zeros_as_plus(dtype):
    x = jnp.array([1.0, -1.0, 0.0, -0.0, -jnp.inf, jnp.inf, jnp.nan] * 5, dtype)
    words = packing.pack_signs(x)
    plus = [True, False, True, True, False, True, False] * 5
    assert words.tolist() == oracle(np.array(plus), 1)
    signs = packing.unpack_signs(words, x.size, dtype)
    assert signs.dtype == dtype
    assert signs.tolist() == [1.0 if bit else -1.0 for bit in plus]


def test_no_signs():
    words = packing.pack_signs(jnp.zeros((0,)))
    assert words.shape == (0,)
    assert packing.unpack_signs(words, 0, jnp.float32).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 25_000_000])
def test_bits_for_is_the_least_width(count):
    bits = bits_for(count)
    assert 1 << bits >= count
    assert bits == 0 or 1 << (bits - 1) < count


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="between 0 and 32, got 33"):
        packing.pack(jnp.zeros((4,), jnp.uint32), 33)
    with pytest.raises(ValueError, match=r"\(2, 2\) must be one-dimensional; flatten"):
        packing.pack(jnp.zeros((2, 2), jnp.uint32), 3)
    with pytest.raises(ValueError, match="40 codes of 1 bits take 2 words"):
        packing.unpack(jnp.zeros((3,), jnp.uint32), 1, 40)


@pytest.mark.parametrize("count", [0, 5, 64, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_signs_and_norm_in_one_reading(count, dtype):
    x = jnp.asarray(np.random.default_rng(count).standard_normal(count), dtype)
    words, norm = jax.jit(packing.pack_signs_and_norm)(x)
    assert words.tolist() == packing.pack_signs(x).tolist()
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.abs(np.asarray(x, np.float64)).sum(), rtol=1e-6)
