"""Packing against an independent oracle: one Python integer that holds all the bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ef_optax._bits import packing
from ef_optax._numeric.shapes import bits_for

# (bits, count). Every way of packing: no bits, whole fractions of a word, codes that are joined
# before they are packed, groups over several words, whole words. Counts: none, one, ragged ends,
# whole groups.
POOL = (
    *((0, 5), (1, 100), (2, 64), (3, 33), (4, 0), (5, 67), (6, 35), (7, 40), (8, 1), (9, 35)),
    *((12, 9), (16, 35), (17, 40), (24, 35), (25, 65), (31, 35), (32, 3)),
)


def oracle(codes: np.ndarray, bits: int) -> list[int]:
    stream = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words)]


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The oracle for many codes, for which one integer is slow: the stream as an array of bits."""
    stream = (codes[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    padded = np.pad(stream.reshape(-1), (0, -stream.size % 32)).astype(np.uint8)
    return np.packbits(padded, bitorder="little").view("<u4")


@jax.jit
def both_ways(codes):
    """Words, and the codes that are read from them, for every case of the pool."""
    words = [packing.pack(x, bits) for x, (bits, _) in zip(codes, POOL, strict=True)]
    back = [packing.unpack(w, *case) for w, case in zip(words, POOL, strict=True)]
    return words, back


def drawn(kind: str, bits: int, count: int) -> np.ndarray:
    top = (1 << bits) - 1
    if kind == "full":
        return np.full(count, top, np.uint32)
    if kind == "alternating":  # reveals bits leaking between fields
        return np.resize([top, 0, top, top, 0], count).astype(np.uint32)
    return np.random.default_rng(bits).integers(0, top, count, np.uint32, endpoint=True)


@pytest.mark.parametrize("kind", ["random", "full", "alternating"])
def test_words_are_the_bit_stream_and_come_back(kind):
    codes = [drawn(kind, *case) for case in POOL]
    for own, words, back, (bits, count) in zip(codes, *both_ways(codes), POOL, strict=True):
        assert words.dtype == back.dtype == jnp.uint32
        assert words.shape == (packing.packed_words(count, bits),)
        assert words.tolist() == oracle(own, bits), f"{bits} bits"
        assert back.tolist() == own.tolist(), f"{bits} bits"


@pytest.mark.parametrize("bits", [3, 13, 17])
def test_many_codes_with_a_ragged_end(bits):
    """Whole groups of many codes are packed where they lie, and what follows them by itself."""
    codes = drawn("random", bits, (1 << 16) + 45)
    words = packing.pack(codes, bits)
    assert words.tolist() == words_of(codes, bits).tolist()
    assert packing.unpack(words, bits, codes.size).tolist() == codes.tolist()


def test_vmap_packs_each_row():
    @jax.jit
    def run(rows):
        words = {
            bits: jax.vmap(lambda r, b=bits: packing.pack(r, b))(x) for bits, x in rows.items()
        }
        unpack = jax.vmap(packing.unpack, (0, None, None))
        return words, {bits: unpack(w, bits, 70) for bits, w in words.items()}

    rng = np.random.default_rng(0)
    rows = {b: rng.integers(0, 1 << b, (3, 70), dtype=np.uint32) for b in (1, 6, 25)}
    words, back = run(rows)
    for bits, x in rows.items():
        assert words[bits].tolist() == [oracle(row, bits) for row in x]
        assert back[bits].tolist() == x.tolist()


DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def test_signs_count_both_zeros_as_plus():
    x = np.array([1.0, -1.0, 0.0, -0.0, -np.inf, np.inf, np.nan] * 5)
    plus = [True, False, True, True, False, True, False] * 5

    @jax.jit
    def run(xs):
        words = [packing.pack_signs(x) for x in xs]
        return words, [
            packing.unpack_signs(w, x.size, x.dtype) for w, x in zip(words, xs, strict=True)
        ]

    for words, signs, dtype in zip(*run([x.astype(d) for d in DTYPES]), DTYPES, strict=True):
        assert words.tolist() == oracle(np.array(plus), 1)
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


def test_signs_and_norm_in_one_reading():
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal(n).astype(d) for n in (0, 5, 64, 100) for d in DTYPES[:2]]
    got = jax.jit(lambda xs: [packing.pack_signs_and_norm(x) for x in xs])(xs)
    for x, (words, norm) in zip(xs, got, strict=True):
        assert words.tolist() == oracle(np.asarray(x, np.float32) >= 0, 1)
        assert norm.dtype == jnp.float32
        np.testing.assert_allclose(norm, np.abs(np.asarray(x, np.float64)).sum(), rtol=1e-6)
