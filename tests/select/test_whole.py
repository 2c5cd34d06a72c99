"""Leaves as one vector, in both forms, against NumPy's stable sort of their concatenation.

The tests lower the sizes at which leaves are joined and the width of a window, so that small
arrays go through the form that reads and writes leaves in place.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax._exchange.exchange import Exchange
from ef_optax._exchange.rounds import HEADER_WORDS
from ef_optax._select import flat_view
from ef_optax._select import leaf as leaf_select
from ef_optax._select import tree as tree_module
from ef_optax._select import whole as whole_module
from ef_optax._select.whole import Whole
from tests.conftest import make_mesh
from tests.programs import compiled
from tests.select.test_selection import adversaries

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
FORMS = ("in place", "joined")

# Leaves that are large and small, ragged and whole, of every rank, empty, and equal to each other.
MANY = (
    ((40, 50), F32),
    ((3,), F32),
    ((0, 4), F32),
    ((), F32),
    ((1999,), F32),
    ((16, 5, 8), F32),
    ((40, 50), F32),
    ((3,), F32),
    ((600,), F32),
)
SIZE = 7246  # of these together
TREES = {
    "many": (MANY, 90),
    "one": ((((60, 70), F32),), 50),
    "empty ends": ((((0,), F32), ((900,), F32), ((1200,), F32), ((0,), F32)), 30),
    "all small": (tuple(((10, 6), F32) for _ in range(40)), 70),  # more than one leaf has
    "mixed": ((((1500,), BF16), ((700,), F32), ((30, 40), F16), ((5,), BF16)), 60),
}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch, nothing_traced_before):
    monkeypatch.setattr(whole_module, "IN_PLACE_SIZE", 1000)
    monkeypatch.setattr(flat_view, "JOIN_LIMIT", 500)
    monkeypatch.setattr(flat_view, "WINDOW", 16)


def whole_of(spec, step) -> Whole:
    dtypes = {dtype for _, dtype in spec}
    likes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in spec)
    return Whole(likes, dtypes.pop() if len(dtypes) == 1 else F32, step)


def cut(flat: np.ndarray, spec) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape, _ in spec])
    parts = np.split(flat, ends[:-1])
    with np.errstate(all="ignore"):
        return [
            part.astype(dtype).reshape(shape)
            for part, (shape, dtype) in zip(parts, spec, strict=True)
        ]


def integers(leaves: list[np.ndarray]) -> np.ndarray:
    """Magnitudes as exact integers, in float32 or in the dtype that all leaves have."""
    dtypes = {x.dtype for x in leaves}
    dtype = dtypes.pop() if len(dtypes) == 1 else F32
    flat = np.concatenate([x.reshape(-1).astype(dtype) for x in leaves])
    width = 8 * dtype.itemsize
    return flat.view(f"uint{width}").astype(np.int64) & ((1 << (width - 1)) - 1)


def oracle(leaves: list[np.ndarray], k: int) -> np.ndarray:
    return np.sort(np.argsort(-integers(leaves), kind="stable")[:k])


@pytest.fixture
def form(request, monkeypatch) -> str:
    if request.param == "joined":
        monkeypatch.setattr(whole_module, "IN_PLACE_SIZE", 1 << 40)
    return request.param


@functools.cache
def selection(tree: str, form: str) -> Callable:
    spec, k = TREES[tree]
    del form
    return jax.jit(lambda xs, step: whole_of(spec, step).top_k(xs, k))


# A tree of one leaf has no small ones, as that with empty ends; all joined vectors are alike.
QUICK = {(tree, "in place") for tree in TREES.keys() - {"one"}} | {("mixed", "joined")}


@pytest.mark.parametrize(
    ("tree", "form"),
    [
        pytest.param(*case, marks=() if case in QUICK else (pytest.mark.slow,))
        for case in itertools.product(TREES, FORMS)
    ],
    indirect=["form"],
)
def test_same_set_as_a_stable_sort_of_the_concatenation(tree: str, form: str) -> None:
    spec, k = TREES[tree]
    size = sum(int(np.prod(shape)) for shape, _ in spec)
    for name, flat in adversaries(size).items():
        leaves = cut(flat.astype(np.float32), spec)
        indices, values = selection(tree, form)(leaves, 3)
        expected = oracle(leaves, k)
        np.testing.assert_array_equal(indices, expected, err_msg=name)
        joined = np.concatenate([x.reshape(-1).astype(values.dtype) for x in leaves])
        np.testing.assert_array_equal(values, joined[expected], err_msg=name)


def test_nan_is_above_all() -> None:
    spec, k = TREES["many"]
    leaves = cut(adversaries(SIZE)["normal"].astype(np.float32), spec)
    leaves[4][7], leaves[1][2], leaves[8][3] = np.nan, np.inf, -np.nan
    indices, _ = selection("many", "in place")(leaves, 3)
    np.testing.assert_array_equal(indices, oracle(leaves, k))
    assert {2000 + 2, 2004 + 7, SIZE - 600 + 3} <= set(indices.tolist())


def test_a_sample_of_the_largest_entries_alone_does_not_mislead() -> None:
    """The threshold that is guessed from it is too high, so it has to be searched for."""
    spec, k = TREES["all small"]
    sizes = tuple(int(np.prod(shape)) for shape, _ in spec)
    sample, *_ = tree_module.plan(sizes, k)
    flat = np.random.default_rng(0).uniform(1, 2, sum(sizes))
    flat[np.asarray(leaf_select.drawn_positions(sum(sizes), sample))] += 10
    flat[: flat.size // 2] -= 0.5  # the entries beside the sample differ, too
    leaves = cut(flat.astype(np.float32), spec)
    indices, _ = selection("all small", "in place")(leaves, 3)
    np.testing.assert_array_equal(indices, oracle(leaves, k))


def test_the_form_in_place_is_the_one_that_is_tested() -> None:
    """The form in place has loops over windows; the other joins all leaves into one vector."""
    spec, _ = TREES["many"]
    leaves = cut(adversaries(SIZE)["normal"].astype(np.float32), spec)
    text = selection("many", "in place").lower(leaves, 3).as_text()
    assert "stablehlo.while" in text and f"tensor<{SIZE}xf32>" not in text


# One worker, a loop over several, and more than are visited leaf by leaf.
@pytest.mark.parametrize(
    ("tree", "n"),
    [("many", 3), ("mixed", 17)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("all small", 3), ("many", 1), ("mixed", 3))
    ],
)
def test_sums_at_entries(tree: str, n: int) -> None:
    """Workers at other entries, at the same ones, and nowhere in some leaves."""
    spec, k = TREES[tree]
    leaves = cut(adversaries(sum(int(np.prod(s)) for s, _ in spec))["normal"], spec)
    size = sum(x.size for x in leaves)
    rng = np.random.default_rng(n)
    places = np.stack([np.sort(rng.choice(size, k, replace=False)) for _ in range(n)])
    places[-1] = np.arange(size - k, size)
    places[0] = np.arange(k)
    values = rng.standard_normal((n, k)).astype(np.float32)

    @jax.jit
    def run(xs, indices, values, step):
        whole = whole_of(spec, step)
        return whole.add(xs, indices, values), whole.scatter(indices, values)

    added, alone = run(leaves, places.astype(np.uint32), values, 5)
    flat = np.zeros(size)
    np.add.at(flat, places.reshape(-1), values.reshape(-1).astype(np.float64))
    starts = np.cumsum([0, *(x.size for x in leaves)])
    for x, got, zero, start in zip(leaves, added, alone, starts, strict=False):
        change = flat[start : start + x.size].reshape(x.shape)
        assert got.dtype == zero.dtype == x.dtype and got.shape == zero.shape == x.shape
        tolerance = 4 * n * float(ml_dtypes.finfo(x.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), x.astype(np.float64) + change, tolerance, tolerance
        )
        np.testing.assert_allclose(np.asarray(zero, np.float64), change, tolerance, tolerance)
        untouched = change == 0
        np.testing.assert_array_equal(np.asarray(got)[untouched], x[untouched])


def test_entries_to_which_nothing_is_added_keep_their_bits() -> None:
    """Also the first one: a zero is not added for a slot without an entry."""
    x, layout = np.full(600, -0.0, np.float32), flat_view.Layout((600,), range(2))
    add = jax.jit(lambda *slots: flat_view.add([x], layout, *slots))
    (got,) = add(jnp.array([[7, 9]], jnp.uint32), jnp.array([[1.0, 2.0]]))
    assert (got[7], got[9]) == (1, 2) and np.flatnonzero(~np.signbit(got)).tolist() == [7, 9]


def test_vmap_selects_in_each_row_as_alone() -> None:
    spec, k = TREES["many"]
    cases = [adversaries(SIZE)[name] for name in ("normal", "heavy ties", "all zero")]
    rows = [cut(flat.astype(np.float32), spec) for flat in cases]
    stacked = [np.stack(leaf) for leaf in zip(*rows, strict=True)]
    run = jax.jit(jax.vmap(lambda xs: whole_of(spec, jnp.int32(0)).top_k(xs, k)))
    indices, _ = run(stacked)
    np.testing.assert_array_equal(indices, [oracle(row, k) for row in rows])


def gradients(steps: int, n: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    names = "abcdefghi"
    return [
        {
            name: np.round(rng.standard_normal((n, *shape)), 2).astype(np.float32)
            for name, (shape, _) in zip(names, MANY, strict=True)
        }
        for _ in range(steps)
    ]


def like_params(grads):
    return jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)


def lift(tx: optax.GradientTransformation, how: str) -> ef.Lifted:
    if how == "simulate":
        return ef.simulate(tx, 4, "data")
    return ef.data_parallel(tx, make_mesh((4,), ("data",)), "data")


@functools.cache
def lifted(how: str) -> tuple[ef.Lifted, Callable]:
    """Four workers that share one budget over the leaves, and their compiled update."""
    tx = lift(ef.error_feedback(ef.global_top_k(0.02), axis_name="data"), how)
    return tx, jax.jit(tx.update)


def trajectory(tx: optax.GradientTransformation, update: Callable, steps: int = 3):
    """Updates of each step and the last residuals."""
    grads = gradients(steps)
    params = like_params(grads[0])
    state, out = tx.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        out.append(updates)
    return jax.tree.map(np.asarray, (out, state))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["simulate", "devices"])
def test_optax_flatten_gives_the_same_to_the_bit(how: str) -> None:
    """Three steps of four workers, with ties: updates and residuals."""
    flat = lift(optax.flatten(ef.error_feedback(ef.top_k(0.02), axis_name="data")), how)
    expected, flat_state = trajectory(flat, jax.jit(flat.update))
    got, state = trajectory(*lifted(how))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    leaves = jax.tree.leaves(state.residual)
    residual = np.concatenate([x.reshape(4, -1) for x in leaves], axis=1)
    np.testing.assert_array_equal(residual, flat_state.residual)


@pytest.mark.slow
def test_several_workers_by_hand_in_a_checked_map(mesh4) -> None:
    """In a checked map: the mean of the messages, and each worker's own residual."""
    grads = gradients(1)[0]
    spec = jax.P("data")
    exchange = Exchange(ef.global_top_k(0.02).codec, "data")

    def local(g):
        g = jax.tree.map(lambda x: x[0], g)
        out = exchange(g, exchange.init(g), want=("residual", "support", "sent"))
        own = jax.tree.map(lambda x: x[None], (out.residual, out.support, out.sent))
        return out.aggregate, own

    mapped = jax.shard_map(local, mesh=mesh4, in_specs=spec, out_specs=(jax.P(), spec))
    aggregate, (residual, support, sent) = jax.jit(mapped)(grads)
    flat = np.concatenate([x.reshape(4, -1) for x in grads.values()], axis=1)
    kept = np.zeros(flat.shape, bool)
    for row, mask in zip(flat, kept, strict=True):
        mask[oracle([row], 145)] = True  # ceil(0.02 * 7246)

    def joined(tree):
        return np.concatenate([np.asarray(x).reshape(4, -1) for x in tree.values()], axis=1)

    np.testing.assert_array_equal(joined(support), kept)
    np.testing.assert_array_equal(joined(sent), np.where(kept, flat, 0))
    np.testing.assert_array_equal(joined(residual), np.where(kept, 0, flat))
    mean = np.where(kept, flat, 0).mean(0)
    got = np.concatenate([np.asarray(x).reshape(-1) for x in aggregate.values()])
    np.testing.assert_allclose(got, mean, atol=1e-6)


def test_bytes_are_the_bits_of_the_whole() -> None:
    tx, update = lifted("devices")
    grads = gradients(1)[0]
    params = like_params(grads)
    report = ef.wire_report(update.lower(grads, tx.init(params), params).compile())
    words = -(-ef.global_top_k(0.02).bits(SIZE) // 32)
    assert report.rounds == 1
    assert report.message_bytes == 4 * (words + HEADER_WORDS)


@pytest.mark.slow
def test_nothing_of_the_size_of_the_model_is_held() -> None:
    """The residual overwrites the old one; a few bits per value are the only other memory."""
    tx = ef.error_feedback(ef.global_top_k(0.01))
    grads = {name: jnp.zeros((256, 64)) for name in "abcdefgh"}
    size = sum(g.size for g in grads.values())

    def step(g, state):
        return tx.update(g, state)[::-1]

    program = compiled(jax.jit(step, donate_argnums=1).lower(grads, tx.init(grads)))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * size
    assert memory.temp_size_in_bytes < 2 * size
    assert not re.search(r"f32\[(256,64|16384)\]\S* copy\(", program.as_text())


@pytest.mark.slow
def test_one_bad_number_skips_the_step() -> None:
    tx, update = lifted("simulate")
    grads = gradients(1)[0]
    grads["e"][2, 1000] = np.nan
    params = like_params(grads)
    updates, state = update(grads, tx.init(params), params)
    assert int(state.exchange.skipped) == 1
    assert all(not np.any(x) for x in jax.tree.leaves((updates, state.residual)))
