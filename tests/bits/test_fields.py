"""Fields laid end to end to the bit: any mixture is recovered, from the least number of words."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import ef_optax as ef
from ef_optax._bits.fields import Packed, exact_bits, from_words, pack, to_words, unpack

# (kind, count): codes of a width, or arrays of a dtype. A short list, so that few are compiled.
KINDS = (1, 2, 3, 4, 6, 8, 12, 31, "float32", "bfloat16", "float8_e5m2", "uint8", "int16")


def field_of(kind, count: int, rng):
    if isinstance(kind, int):
        codes = rng.integers(0, 1 << kind, count)
        return pack(jnp.asarray(codes, jnp.uint32), kind), codes
    size = jnp.dtype(kind).itemsize
    raw = rng.integers(0, 256, count * size).astype(np.uint8)
    return jax.lax.bitcast_convert_type(
        jnp.asarray(raw).reshape(count, size)[:, 0]
        if size == 1
        else jnp.asarray(raw).reshape(count, size),
        kind,
    ), raw


def bits_in_order(tree) -> np.ndarray:
    """The bits of all fields, each little-endian, without padding."""
    out = []
    for field in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Packed)):
        data = field.words if isinstance(field, Packed) else field
        bits = np.unpackbits(np.asarray(data).view(np.uint8), bitorder="little")
        out.append(bits[: field.bits] if isinstance(field, Packed) else bits)
    return np.concatenate([np.zeros(0, np.uint8), *out])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 1, 3, 8, 33])), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_any_mixture_comes_back_in_the_least_number_of_words(kinds, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = [field_of(kind, count, rng)[0] for kind, count in kinds]
    expected = sum(c * (k if isinstance(k, int) else 8 * jnp.dtype(k).itemsize) for k, c in kinds)
    assert exact_bits(tree) == expected
    words = to_words(tree)
    assert words.dtype == jnp.uint32 and words.size == math.ceil(expected / 32)
    back = from_words(words, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(bits_in_order(back), bits_in_order(tree))


def test_the_stream_by_hand() -> None:
    """Whole words first, not shifted; then the remainders: 5 bits of signs, 16 of a bfloat16."""
    tree = {
        "a": pack(jnp.arange(37) % 2, 1),
        "b": jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16),
        "c": jnp.asarray([7], jnp.uint32),
    }
    words = np.asarray(to_words(tree)).tolist()
    bf16 = [0x3F80, 0x4000, 0x4040]
    assert words == [0xAAAAAAAA, bf16[0] | bf16[1] << 16, 7, 0b01010 | bf16[2] << 5]


def test_rests_cross_words_and_stacks_keep_their_rows() -> None:
    """Five rows of 31 bits are 155 bits: five words, with remainders that straddle each border."""
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**31, (5, 1)), jnp.uint32)
    stacked = jax.vmap(lambda row: pack(row, 31))(codes)
    words = to_words(stacked)
    assert words.size == 5
    back = from_words(words, stacked)
    assert jax.vmap(lambda f: unpack(f, 31, 1))(back).tolist() == codes.tolist()


def test_large_fields_are_not_shifted() -> None:
    """The whole words of a field appear unchanged, beside one that ends within a word."""
    signs = pack(jnp.ones(5, jnp.uint32), 1)
    values = jnp.arange(100, dtype=jnp.float32)
    words = to_words([signs, values])
    np.testing.assert_array_equal(words[:100], jax.lax.bitcast_convert_type(values, jnp.uint32))


def test_booleans_are_refused() -> None:
    with pytest.raises(TypeError, match=r"bool.*ef\.pack"):
        to_words(jnp.zeros(3, bool))


def test_fractions_are_not_packed_away() -> None:
    with pytest.raises(TypeError, match="float32 would lose their fractions"):
        pack(jnp.array([0.7, 1.2]), 2)


def test_lists_are_packed_as_arrays_are() -> None:
    assert ef.extend.pack([1, 2], 2).words.tolist() == pack(jnp.array([1, 2]), 2).words.tolist()
    assert ef.extend.pack([], 2).words.shape == (0,)


def test_only_a_packed_field_is_unpacked() -> None:
    for bad in (jnp.zeros(1, jnp.uint32), [433], None):
        with pytest.raises(TypeError, match=r"unpack: field=.* must be what ef_optax\.pack"):
            ef.extend.unpack(bad, 2, 5)  # type: ignore[arg-type]
