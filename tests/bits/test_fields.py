"""Fields laid end to end to the bit: any mixture is recovered, from the least number of words."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._bits.fields import (
    Packed,
    exact_bits,
    from_rows,
    from_words,
    pack,
    to_words,
    unpack_signs,
)
from tests.programs import compiled

# A field is (kind, count, rows): codes of a width, of which rows are stacked, or an array of a
# dtype. Mixtures of all kinds, and of fields that end within a word, at its border, or have none.
MIXTURES = (
    (),
    (("float32", 3, 1),),
    ((1, 0, 1), (8, 1, 1), ("bfloat16", 0, 1)),
    ((1, 33, 1), ("float8_e5m2", 3, 1), (31, 8, 1), (2, 33, 1), ("uint8", 1, 1), (3, 8, 1)),
    ((31, 1, 5), ("float32", 8, 1), (12, 3, 1), (6, 33, 3)),
    (("int16", 33, 1), (4, 8, 1), ("bfloat16", 1, 1), (1, 8, 4), ("float8_e5m2", 33, 1)),
    ((3, 33, 2), (3, 33, 2), ("uint8", 8, 1), ("bfloat16", 3, 1), ("bfloat16", 3, 1), (12, 1, 1)),
)


def bits_of(codes: np.ndarray, width: int) -> np.ndarray:
    """The bits of codes, one after the other, each little-endian."""
    return (codes.reshape(-1, 1) >> np.arange(width) & 1).astype(np.uint8).reshape(-1)


def words_of(bits: np.ndarray) -> np.ndarray:
    padded = np.pad(bits, (0, -bits.size % 32))
    return np.packbits(padded, bitorder="little").view("<u4")


def field_of(kind, count: int, rows: int, rng):
    """A random field, and the bits of each of its rows."""
    if isinstance(kind, int):
        codes = rng.integers(0, 1 << kind, (rows, count))
        bits = [bits_of(row, kind) for row in codes]
        words = np.stack([words_of(row) for row in bits])
        return Packed(words[0] if rows == 1 else words, count * kind), bits
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    raw = rng.integers(0, 256, count * dtype.itemsize).astype(np.uint8)  # NaN as well
    return raw.view(dtype), [np.unpackbits(raw, bitorder="little")]


def stream(fields) -> np.ndarray:
    """The words of a message by its definition: whole words of all rows, then the remainders."""
    rows = [row for _, bits in fields for row in bits]
    whole = [row[: row.size // 32 * 32] for row in rows]
    rests = [row[row.size // 32 * 32 :] for row in rows]
    return words_of(np.concatenate([np.zeros(0, np.uint8), *whole, *rests]))


@jax.jit
def there_and_back(trees):
    words = [to_words(tree) for tree in trees]
    return words, [from_words(w, tree) for w, tree in zip(words, trees, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_comes_back_in_the_least_number_of_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [[field_of(*field, rng) for field in mixture] for mixture in MIXTURES]
    trees = [[field for field, _ in fields] for fields in drawn]
    for fields, tree, words, back in zip(drawn, trees, *there_and_back(trees), strict=True):
        bits = sum(row.size for _, rows in fields for row in rows)
        assert exact_bits(tree) == bits
        assert words.dtype == jnp.uint32 and words.size == math.ceil(bits / 32)
        np.testing.assert_array_equal(words, stream(fields))
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for got, sent in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert got.dtype == sent.dtype and got.shape == sent.shape
            assert np.asarray(got).tobytes() == sent.tobytes()


def test_the_stream_by_hand() -> None:
    """Whole words first, not shifted; then the remainders: 5 bits of signs, 16 of a bfloat16."""

    @jax.jit
    def run():
        three = jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16)
        return to_words({"a": pack(jnp.arange(37) % 2, 1), "b": three, "c": jnp.uint32(7)[None]})

    bf16 = [0x3F80, 0x4000, 0x4040]
    assert run().tolist() == [0xAAAAAAAA, bf16[0] | bf16[1] << 16, 7, 0b01010 | bf16[2] << 5]


def test_booleans_are_refused() -> None:
    with pytest.raises(TypeError, match=r"bool.*ef_optax\.extend\.pack"):
        to_words(jnp.zeros(3, bool))


def test_fractions_are_not_packed_away() -> None:
    with pytest.raises(TypeError, match="float32 would lose their fractions"):
        pack(jnp.array([0.7, 1.2]), 2)


def test_lists_are_packed_as_arrays_are() -> None:
    assert ef.extend.pack([1, 2], 2).words.tolist() == pack(jnp.array([1, 2]), 2).words.tolist()
    assert ef.extend.pack([], 2).words.shape == (0,)


def test_only_a_packed_field_is_unpacked() -> None:
    for bad in (jnp.zeros(1, jnp.uint32), [433], None):
        with pytest.raises(
            TypeError, match=r"unpack: field=.* must be what ef_optax\.extend\.pack"
        ):
            ef.extend.unpack(bad, 2, 5)  # type: ignore[arg-type]


def test_no_two_workers_codes_are_read_from_one_slice() -> None:
    """XLA:CPU would call a function for each value of a loop that reads one slice twice."""
    like = [Packed(jnp.zeros(64, jnp.uint32), 64 * 32)] * 3

    @jax.jit
    def mean_signs(words: jax.Array) -> list[jax.Array]:
        fields = from_rows(words, like, words[0, 0])
        signs = [
            [unpack_signs(Packed(w, 2048), 2048, jnp.float32) for w in x.words] for x in fields
        ]
        return [(a + b) / 2 for a, b in signs]

    words = jnp.arange(2 * 3 * 64, dtype=jnp.uint32).reshape(2, 192)
    text = compiled(mean_signs.lower(words)).as_text()
    taken = re.findall(r"dynamic_slice_sizes={([\d,]+)}", text)
    assert set(taken) == {"1,64"}
