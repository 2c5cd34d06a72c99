"""Selection against NumPy's stable sort; bit masks against NumPy's booleans.

The tests lower the size up to which the backend sorts, so that small arrays go through the
code without sorting. Every shape is compiled once and shared by all values.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ef_optax._bits import bitmask
from ef_optax._select import blocks as block_select
from ef_optax._select import leaf as leaf_select

# (entries, kept, dtype): sampled (small and smallest k, 16-bit), nearly everything kept, sorted.
POOL = (
    (5000, 50, np.float32),
    (3001, 1, np.float32),
    (4096, 100, ml_dtypes.bfloat16),
    (2000, 1500, np.float32),
    (100, 7, np.float32),
)
SIZES = [case[0] for case in POOL]
SHAPES = [pytest.param(*c, marks=pytest.mark.slow if c[0] in (3001, 2000) else ()) for c in POOL]


@pytest.fixture(autouse=True)
def sort_only_the_smallest(monkeypatch):
    monkeypatch.setattr(leaf_select, "SORT_SIZE", 100)


def integers(x: np.ndarray) -> np.ndarray:
    """Magnitudes as exact integers, from the bits: NumPy's own comparison may flush denormals."""
    width = x.dtype.itemsize * 8
    return x.view(f"uint{width}").astype(np.int64) & ((1 << (width - 1)) - 1)


def oracle(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-integers(x), kind="stable")[:k])


@functools.cache
def compiled(k: int):
    return jax.jit(lambda x: leaf_select.top_k_indices(x, k))


def check(x: np.ndarray, k: int) -> None:
    indices = compiled(k)(x)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, oracle(x, k))


def adversaries(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    normal = rng.standard_normal(size)
    place = np.arange(size)
    return {
        "normal": normal,
        "all zero": np.zeros(size),
        "both zeros": np.where(normal > 0, 0.0, -0.0),
        "all equal": np.full(size, -1.5),
        "rising": np.sort(normal),
        "falling": np.sort(normal)[::-1],
        "denormal": normal * 1e-42,
        "heavy ties": np.round(normal, 1),
        "two values": np.where(place % 16 == 3, 5.0, 1.0),
        "mostly zero": np.where(rng.random(size) < 0.003, normal, 0.0),
        "half zero": np.where(rng.random(size) < 0.5, normal, 0.0),
        "some inf": np.where(rng.random(size) < 0.1, -np.inf, normal),
        "all inf": np.full(size, np.inf),
        "one spike": np.where(place == size // 3, 1e30, normal),
        "huge": np.clip(normal, -3, 3) * 1e38,
        "all large ones together": np.where(place < size // 40, 100 * normal, normal),
        "periodic": 1.0 + np.sin(place * (2 * np.pi / 16)),
        "every scale": normal * 10.0 ** (place % 70 - 35),
    }


@pytest.mark.parametrize("size,k,dtype", SHAPES, ids=SIZES)
def test_same_set_as_a_stable_sort_on_adversaries(size, k, dtype):
    for name, x in adversaries(size).items():
        with np.errstate(all="ignore"):
            x = x.astype(dtype)
        try:
            check(x, k)
        except AssertionError as error:
            raise AssertionError(f"differs on {name!r}") from error


@pytest.mark.parametrize("size,dtype", [(100, np.float32), (64, ml_dtypes.bfloat16)])
def test_the_largest_entry_of_a_small_leaf_on_adversaries(size, dtype):
    test_same_set_as_a_stable_sort_on_adversaries(size, 1, dtype)


@pytest.mark.parametrize("k", [1, 3])
def test_same_set_as_a_stable_sort_in_float64(k):
    with jax.enable_x64(True):
        select = jax.jit(lambda x: leaf_select.top_k_indices(x, k))
        for name, x in adversaries(100).items():
            indices = select(x)
            largest = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
            np.testing.assert_array_equal(indices, largest, err_msg=name)


@pytest.mark.parametrize("size,k,dtype", POOL[:1] + POOL[-1:], ids=[5000, 100])
@given(data=st.data())
@settings(max_examples=25)
def test_same_set_as_a_stable_sort(size, k, dtype, data):
    few = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=6))
    drawn = hnp.arrays(np.float32, size, elements=st.sampled_from(few), fill=st.just(few[0]))
    check(data.draw(drawn), k)


def test_a_bad_guess_costs_passes_not_the_result(monkeypatch):
    """The first search's answer, shifted: far too high, far too low, and by one."""
    size, k, dtype = POOL[0]
    search, calls = leaf_select.search, []

    @jax.jit
    def select(x, off):
        def misled(*args, **kwargs):
            threshold, words, kept = search(*args, **kwargs)
            calls.append(threshold)
            return (threshold + off if len(calls) == 1 else threshold), words, kept

        monkeypatch.setattr(leaf_select, "search", misled)
        return leaf_select.top_k_indices(x, k)

    x = adversaries(size)["normal"].astype(dtype)
    for off in (-(1 << 29), -(1 << 20), -1, 0, 1, 1 << 20, 1 << 29):
        np.testing.assert_array_equal(select(x, np.int32(off)), oracle(x, k), err_msg=str(off))
    assert len(calls) == 2  # on the sample, and on everything


def test_nan_is_selected_deterministically():
    size, k, dtype = POOL[0]
    for bits in (0x7FC00000, 0x7FFFFFFF):
        x = np.full(size, bits, np.uint32).view(dtype)
        first, second = compiled(k)(x), compiled(k)(x)
        assert len(set(first.tolist())) == k
        assert 0 <= int(first.min()) <= int(first.max()) < size
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_vmap_selects_in_each_row_as_alone():
    size, k, dtype = POOL[0]
    cases = adversaries(size)
    rows = np.stack([cases[name] for name in ("normal", "heavy ties", "all zero")]).astype(dtype)
    indices = jax.jit(jax.vmap(lambda row: leaf_select.top_k_indices(row, k)))(rows)
    np.testing.assert_array_equal(indices, [oracle(row, k) for row in rows])


@pytest.mark.slow
def test_checked_shard_map_selects_on_each_device(mesh4):
    size, k, dtype = POOL[0]
    cases = adversaries(size)
    names = ("normal", "heavy ties", "all zero", "one spike")
    rows = np.stack([cases[name] for name in names]).astype(dtype)
    spec = jax.P("data")

    def local(block):
        return leaf_select.top_k_indices(block[0], k)[None]

    indices = jax.jit(jax.shard_map(local, mesh=mesh4, in_specs=spec, out_specs=spec))(rows)
    np.testing.assert_array_equal(indices, [oracle(row, k) for row in rows])


@pytest.mark.parametrize("size,k", [(0, 0), (1, 0), (1, 1), (7, 7), (5000, 0), (5000, 5000)])
def test_nothing_and_everything(size, k):
    indices = leaf_select.top_k_indices(jnp.arange(size, dtype=jnp.float32), k)
    assert indices.dtype == jnp.int32
    assert indices.tolist() == list(range(k))


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="between 0 and the size 3, got 4"):
        leaf_select.top_k_indices(jnp.zeros(3), 4)
    with pytest.raises(ValueError, match=r"\(1, 3\): flatten"):
        leaf_select.top_k_indices(jnp.zeros((1, 3)), 1)


@functools.cache
def masks(capacity: int):
    @jax.jit
    def run(mask, limit):
        words = bitmask.pack_mask(mask)
        listed = bitmask.positions(words, capacity)
        return listed, bitmask.count_ones(words), bitmask.first_ones(words, limit, capacity)

    return run


@pytest.mark.parametrize("size,capacity", [(9000, 400), (77, 5)])
@given(data=st.data())
@settings(max_examples=25)
def test_masks_are_listed_counted_and_cut(size, capacity, data):
    dense = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    seed = data.draw(st.integers(0, 1 << 16))
    limit = data.draw(st.integers(0, capacity))
    mask = np.random.default_rng(seed).random(size) < dense
    places = np.flatnonzero(mask)
    listed, count, cut = masks(capacity)(mask, np.uint32(limit))
    shown = min(capacity, places.size)
    np.testing.assert_array_equal(listed[:shown], places[:shown])
    assert int(jnp.max(listed)) < -(-size // 128) * 128
    assert int(count) == places.size
    kept = np.zeros(size, bool)
    kept[places[:limit]] = True
    np.testing.assert_array_equal(cut, bitmask.pack_mask(jnp.asarray(kept)))


# Above the first bound a float32 no longer holds every integer.
BOUNDS = ((1 << 24) - 1, 1 << 25)


@jax.jit
def sums(counts):
    return [bitmask.running_sum(counts, most) for most in BOUNDS]


@given(counts=hnp.arrays(np.uint32, 5000, elements=st.integers(0, 1 << 19)))
@settings(max_examples=20)
def test_running_sums_are_exact_up_to_the_bound_and_beyond_it_after(counts):
    exact = np.cumsum(counts, dtype=np.uint64)
    for most, got in zip(BOUNDS, map(np.asarray, sums(counts)), strict=True):
        np.testing.assert_array_equal(got[exact <= most], exact[exact <= most])
        assert (got[exact > most] > most).all()


@functools.cache
def in_blocks(length: int, k: int):
    return jax.jit(lambda x: block_select.block_top_k_indices(x, length, k))


# Groups of 16 entries and of 1, blocks that cannot be cut into words, every entry kept.
@pytest.mark.parametrize(
    "length,k",
    [(1024, 10), pytest.param(512, 60, marks=pytest.mark.slow), (300, 3), (64, 64)],
    ids=str,
)
def test_each_block_gets_the_set_of_a_stable_sort(length, k):
    for name, x in adversaries(6 * length + 5).items():
        with np.errstate(all="ignore"):
            x = x.astype(np.float32)
        indices = in_blocks(length, k)(x)
        assert indices.dtype == jnp.int32
        expected = np.stack([oracle(block, k) for block in x[: 6 * length].reshape(6, length)])
        np.testing.assert_array_equal(indices, expected, err_msg=name)


def test_bad_blocks_say_what_to_do():
    with pytest.raises(ValueError, match=r"\(3, 1\): flatten"):
        block_select.block_top_k_indices(jnp.zeros((3, 1)), 1, 1)
