"""Leaves in blocks: norms over the whole range, and elementwise work."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_optax as ef
from ef_optax._numeric.blocks import block_count, blockwise
from ef_optax._numeric.norms import block_extremes, block_norms, block_sums
from tests.programs import compiled

# Whole blocks, a last one that is not full, odd lengths, one block, and leaves below a block.
SHAPES = [
    (4096, 512),
    (2064, 512),
    (2049, 512),
    (1000, 96),
    (999, 7),
    (5, 512),
    (4133, None),
    (70_001, None),
    (70_000, 1000),
    (5003, 1000),
    (20_000, 10_001),
    (1, None),
]


def reference(x: np.ndarray, block: int | None, norm: str) -> np.ndarray:
    """Norms of the blocks in float64, whose squares neither overflow nor underflow."""
    length = block or x.size
    parts = [x[i : i + length].astype(np.float64) for i in range(0, x.size, length)]
    if norm == "linf":
        return np.array([np.max(np.abs(part)) for part in parts])
    return np.array([np.sqrt(np.sum(part**2)) for part in parts])


@functools.partial(jax.jit, static_argnames="block")
def everything(x, pair, low, high, block):
    """All that is done in blocks to one leaf, in one program."""
    return {
        "norms": {norm: block_norms(x, block, norm) for norm in ("l2", "linf")},
        "sums": block_sums(pair, block),
        "lone sum": block_sums(pair[1:], block),
        "extremes": block_extremes(pair[0], block),
        "affine": blockwise(lambda x, a, b: x * a + b, x, low, high, block=block),
    }


@functools.cache
def case(size: int, block: int | None):
    """Inputs of the program above, and what it returns."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size).astype(np.float32)
    shifted = rng.uniform(-2, 1, size).astype(np.float32)
    scales = rng.standard_normal((2, block_count(size, block))).astype(np.float32)
    inputs = x, (shifted, np.square(shifted)), *scales
    return inputs, jax.device_get(everything(*inputs, block))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("size", "block"), SHAPES)
def test_block_norms_are_those_of_numpy(size: int, block: int | None, norm: str) -> None:
    (x, *_), out = case(size, block)
    got = out["norms"][norm]
    assert got.shape == (block_count(size, block),)
    np.testing.assert_allclose(got, reference(x, block, norm), rtol=2e-6)


two_norms = jax.jit(lambda x: block_norms(x, 512, "l2"))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-120, 126), min_size=9, max_size=9), st.integers(0, 2**32 - 1), st.data()
)
def test_a_2_norm_neither_overflows_nor_underflows(
    exponents: list[int], seed: int, data: st.DataObject
) -> None:
    """Every block has its own magnitude, from near denormal to near the largest number.

    No value is denormal: a processor may count those as zeros.
    """
    wide = data.draw(st.booleans())
    rng = np.random.default_rng(seed)
    x = rng.uniform(1, 2, (9, 512)) * rng.choice([-1, 1], (9, 512))
    magnitudes = np.array(exponents, np.float64)[:, None] * np.ones(x.shape)
    if wide:  # all magnitudes within a block too
        magnitudes += rng.integers(-30, 1, x.shape)
    x *= np.exp2(np.maximum(magnitudes, -126))
    x = x.astype(np.float32).reshape(-1)[: 9 * 512 - 3]
    expected = reference(x, 512, "l2")
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)
    np.testing.assert_allclose(two_norms(x), expected, rtol=2e-6)


@pytest.mark.parametrize(("size", "block"), SHAPES)
def test_sums_and_extremes_are_those_of_numpy(size: int, block: int | None) -> None:
    (_, (x, squares), *_), out = case(size, block)
    length = block or size
    cut = range(0, size, length)
    for values, got in zip((x, squares, squares), (*out["sums"], *out["lone sum"]), strict=True):
        expected = [values[i : i + length].sum(dtype=np.float64) for i in cut]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    low, high = out["extremes"]
    assert low.tolist() == [x[i : i + length].min() for i in cut]
    assert high.tolist() == [x[i : i + length].max() for i in cut]


both_norms = jax.jit(lambda x: [block_norms(x, 512, norm) for norm in ("l2", "linf")])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_is_seen_in_its_block_only(bad: float) -> None:
    x = np.ones(2000, np.float32)
    x[700] = bad
    for got in map(np.asarray, both_norms(x)):
        assert np.isfinite(got).tolist() == [True, False, True, True]
        assert np.isnan(got[1]) == np.isnan(bad)


def test_norms_of_zeros_and_of_nothing() -> None:
    for zeros in both_norms(np.zeros(1000, np.float32)):
        assert zeros.tolist() == [0.0, 0.0]
    for nothing in both_norms(np.zeros(0, np.float32)):
        assert nothing.shape == (0,)


@pytest.mark.parametrize(("size", "block"), SHAPES)
def test_blockwise_gives_each_value_what_its_block_has(size: int, block: int | None) -> None:
    (x, _, low, high), out = case(size, block)
    own = np.arange(size) // (block or size)
    np.testing.assert_allclose(out["affine"], x * low[own] + high[own], rtol=1e-5, atol=1e-6)


# Room for message and partial sums, and none for a copy of the leaf, which would be 4 bytes.
BYTES_A_VALUE = 2.0


@pytest.mark.parametrize(
    "size", [(1 << 18) + 64, pytest.param(1 << 18, marks=pytest.mark.slow)], ids=["rest", "whole"]
)
@pytest.mark.parametrize(
    "compressor",
    [
        ef.qsgd(7, key=0, bucket=512),
        *(
            pytest.param(compressor, marks=pytest.mark.slow)
            for compressor in (
                ef.block_quantize(4, block=512),
                ef.two_mean_sign(),
                ef.qsgd(7, key=0, bucket=512, norm="linf"),
                ef.dorefa(4, key=0, bucket=512),
                ef.uniform(4, bucket=512),
                ef.rms_sign(),
                ef.ternary(0),
                ef.sampled_top_k(0.01),
                ef.redsync(0.01),
            )
        ),
    ],
    ids=lambda compressor: type(compressor.codec).__name__,
)
def test_a_step_in_blocks_makes_no_copy_of_the_leaf(compressor: ef.Compressor, size: int) -> None:
    """Also if the last block is not full."""
    codec = compressor.codec

    def step(g: jax.Array, e: jax.Array, seed: jax.Array) -> tuple[object, jax.Array]:
        p = g + e
        message = codec.encode(p, None if codec.deterministic else jax.random.key(seed))
        return message, codec.residual(p, message)

    leaf = jax.ShapeDtypeStruct((size,), jnp.float32)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    program = compiled(jax.jit(step, donate_argnums=1).lower(leaf, leaf, seed))
    assert program.memory_analysis().temp_size_in_bytes <= BYTES_A_VALUE * size
