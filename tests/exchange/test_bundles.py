"""Leaves that share a program get the same results as each leaf alone.

Equal small leaves are stacked, small leaves of a family are rows of one array, and large ones are
encoded together. Some tests lower the sizes at which this begins, so that small leaves go through
the code for large ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks.adversaries import adversaries, magnitudes
from benchmarks.compile_time import kernels_of
from ef_optax._bits import fields
from ef_optax._exchange import joined, padded, stack
from ef_optax._exchange.bundles import bundles_of
from ef_optax._exchange.joined import row_of
from ef_optax._exchange.stack import stackable
from ef_optax._numeric import offsets
from ef_optax._numeric.shapes import like_of
from ef_optax._select import leaf as leaf_select
from ef_optax.compressors.sparse._sparse import by_size
from tests.compressors.pool import CASES
from tests.programs import compiled

# One family: samples of 256, indices of 13 bits.
SHAPES = {"a": (5000,), "b": (50, 100), "c": (4500,), "d": (3, 9, 170), "e": (5000,)}
CODEC = ef.top_k(0.01).codec


@pytest.fixture
def everything_is_large(monkeypatch, nothing_traced_before):
    monkeypatch.setattr(leaf_select, "SORT_SIZE", 100)
    monkeypatch.setattr(stack, "STACK_LIMIT", 100)


SLOW = pytest.mark.slow


def likes(shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def together_and_each(compressor):
    """A program: updates and residuals of a first step of all leaves, and of each leaf alone."""
    tx = ef.error_feedback(compressor)

    def step(grads):
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.residual

    return jax.jit(
        lambda grads: (step(grads), {key: step({key: grad}) for key, grad in grads.items()})
    )


def bits(tree):
    """NaN is equal to NaN, and 0 is not -0."""
    return [np.asarray(x).view(f"u{x.dtype.itemsize}") for x in jax.tree.leaves(tree)]


def assert_same_bits(one, other, message=""):
    for a, b in zip(bits(one), bits(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=message)


########################################################################################
# Which leaves share
########################################################################################


def test_leaves_of_a_family_are_joined_and_equal_small_ones_stacked():
    shapes = [(70_000,), (8, 9), (256, 300), (8, 9), (1 << 20,), (200,), (16, 16), (900, 1000)]
    shapes += [(1 << 17,), (5,)]
    bundles = bundles_of([CODEC] * len(shapes), likes(shapes), [None] * len(shapes))
    assert [(b.kind, b.members) for b in bundles] == [
        ("group", (0, 2)),  # 17 bits for an index
        ("stack", (1, 3)),  # 7
        ("leaf", (4,)),  # 20
        ("group", (5, 6)),  # 8
        ("leaf", (7,)),  # 20, and a smaller sample than 2^20 values have
        ("leaf", (8,)),
        ("leaf", (9,)),
    ]


@pytest.mark.parametrize(
    "codec", [ef.scaled_sign(), ef.exchanges.leader_top_k(0.01), ef.top_k(0.9)], ids=repr
)
def test_what_has_no_family_is_left_alone(codec):
    bundles = bundles_of([codec.codec] * 2, likes([(70_000,)] * 2), [None] * 2)
    assert [b.kind for b in bundles] == ["leaf", "leaf"]


########################################################################################
# Messages
########################################################################################


@functools.cache
def encode_together(dtype):
    def run(leaves, step):
        rows = offsets.as_data(range(len(leaves)), step)
        found = []
        for members, message in zip(by_size(leaves), CODEC.encode_each(leaves, rows), strict=True):
            k = CODEC.count(leaves[members[0]].size)
            indices = jax.vmap(lambda field, k=k: ef.extend.unpack(field, 13, k))
            found.append((indices(message["indices"]), message["values"]))
        return found

    return jax.jit(run)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_messages_of_adversaries_are_those_of_each_alone(dtype):
    """Indices and values are those of a stable sort of each leaf, whatever the others hold."""
    cases = {shape: adversaries(int(np.prod(shape)), dtype) for shape in SHAPES.values()}
    names = list(cases[SHAPES["a"]])
    for turn in range(0, len(names), 2):  # neighbours differ, in every turn
        chosen = [names[(turn + 3 * i) % len(names)] for i in range(len(SHAPES))]
        leaves = [
            np.asarray(cases[shape][name]).reshape(shape)
            for shape, name in zip(SHAPES.values(), chosen, strict=True)
        ]
        found = encode_together(dtype)(leaves, np.int32(0))
        for members, (indices, values) in zip(by_size(leaves), found, strict=True):
            for row, i in enumerate(members):
                flat = leaves[i].reshape(-1)
                order = np.argsort(-magnitudes(flat), kind="stable")
                expected = np.sort(order[: CODEC.count(flat.size)])
                np.testing.assert_array_equal(indices[row], expected, chosen[i])
                assert_same_bits(values[row], flat[expected], chosen[i])


@pytest.mark.usefixtures("everything_is_large")
def test_a_bad_guess_for_one_leaf_or_all_costs_passes_not_the_result(monkeypatch):
    search = leaf_select.search
    x = adversaries(5000, jnp.float32)["normal"]
    leaves = [x, jnp.flip(x), x[:4500]]

    @jax.jit
    def select(leaves, off):
        calls = []

        def misled(*args, **kwargs):
            threshold, words, kept = search(*args, **kwargs)
            calls.append(threshold)
            return (threshold + off if len(calls) == 1 else threshold), words, kept

        with monkeypatch.context() as patch:
            patch.setattr(leaf_select, "search", misled)
            return leaf_select.top_k_of_each(leaves, [50, 50, 45], [0, 1, 2])[0]

    for off in (-(1 << 29), -(1 << 20), -1, 1, 1 << 20, 1 << 29):
        for row, leaf, k in zip(select(leaves, np.int32(off)), leaves, (50, 50, 45), strict=True):
            expected = np.sort(np.argsort(-magnitudes(leaf), kind="stable")[:k])
            np.testing.assert_array_equal(row[:k], expected, err_msg=str(off))
            assert not row[k:].any()


# A sum over a leaf is not taken in the same order in a stack of leaves.
ROUNDED = {
    "scaled_sign",
    "qsgd",
    "compose-qsgd-random_k",
    "dorefa",
    "ternary-clipped-quartic",
    "uniform",
    "uniform-random",
    "block_quantize",
    "rotate-kashin",
    "wangni",
}
QUICK = {"identity", "top_k", "random_k", "sign", "scaled_sign", "qsgd"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in CASES.items()
        if case.settles and stackable(case.make().codec, np.zeros(1))
    ],
)
def test_stacked_leaves_get_what_each_gets_alone(name):
    run = together_and_each(CASES[name].make())
    rng = np.random.default_rng(1)
    grads = {key: jnp.asarray(rng.normal(size=(12, 10)).astype(np.float32)) for key in "abc"}

    together, each = run(grads)
    for key, grad in grads.items():
        alone = [part[key] for part in each[key]]
        stacked = [part[key] for part in together]
        if name in ROUNDED:  # the residual of a rotation has been rounded some twenty times
            room = 32 * np.finfo(np.float32).eps * float(jnp.max(jnp.abs(grad)))
            for one, other in zip(stacked, alone, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=room)
        else:
            assert_same_bits(stacked, alone)


########################################################################################
# Leaves that are joined in one vector
########################################################################################


def separable(name: str) -> bool:
    codec = CASES[name].make().codec
    return CASES[name].settles and row_of(codec) is not None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in {"qsgd-linf-bucket", "block_top_k"} else pytest.mark.slow
        )
        for name in CASES
        if separable(name)
    ],
)
def test_joined_leaves_get_what_each_gets_alone(name):
    """Random codecs draw for each leaf what they draw for it alone."""
    compressor = CASES[name].make()
    row = row_of(compressor.codec)
    shapes = {"a": (row,), "b": (3, row), "ragged": (row + 5,), "c": (row, 2), "d": (row,)}
    names = sorted(shapes)  # the order of the leaves
    bundles = bundles_of([compressor.codec] * 5, likes([shapes[n] for n in names]), [None] * 5)
    assert [(b.kind, b.members) for b in bundles] == [("group", (0, 1, 2, 3)), ("leaf", (4,))]
    run = together_and_each(compressor)
    rng = np.random.default_rng(1)
    grads = {
        key: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for key, shape in shapes.items()
    }

    together, each = run(grads)
    for key, grad in grads.items():
        room = 8 * np.finfo(np.float32).eps * float(jnp.max(jnp.abs(grad)))  # of a block's norm
        for one, other in zip(together, each[key], strict=True):
            np.testing.assert_allclose(one[key], other[key], rtol=0, atol=room, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "qsgd-linf-bucket" else pytest.mark.slow)
        for name in CASES
        if separable(name) and CASES[name].make().codec.ignores_zeros
    ],
)
def test_leaves_with_zeros_between_them_get_what_each_gets_alone(name):
    """A leaf of whole rows is not among them; if all were equal, they would be a stack."""
    codec = CASES[name].make().codec
    codec = dataclasses.replace(codec, **{"block" if hasattr(codec, "block") else "bucket": 16})
    compressor, row = ef.extend.Compressor(codec), row_of(codec)
    shapes = {"a": (row + 5,), "b": (3, 7), "c": (row,), "d": (2, row - 1), "e": (1,), "f": (3, 7)}
    bundles = bundles_of([codec] * 6, likes(shapes.values()), [None] * 6)
    assert [(b.kind, b.members) for b in bundles] == [("group", (0, 1, 3, 4, 5)), ("leaf", (2,))]
    equal = bundles_of([codec] * 2, likes([(3, 7), (3, 7)]), [None] * 2)
    assert [b.kind for b in equal] == ["stack"]
    run = together_and_each(compressor)
    rng = np.random.default_rng(1)
    grads = {
        key: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for key, shape in shapes.items()
    }
    together, each = run(grads)
    for key, grad in grads.items():
        room = 8 * np.finfo(np.float32).eps * float(jnp.max(jnp.abs(grad)))  # of a block's norm
        for one, other in zip(together, each[key], strict=True):
            np.testing.assert_allclose(one[key], other[key], rtol=0, atol=room, err_msg=key)


def test_signs_of_leaves_are_those_of_each_alone():
    """Leaves of whole words are decoded as one vector, other small ones are rows of an array."""
    shapes = {"a": (33,), "b": (8, 8), "c": (7, 9), "d": (64,), "e": (5, 3), "f": (2, 7), "g": (1,)}
    shapes |= {"h": (2049, 32), "i": (96,), "j": (65569,)}  # two are large, one of whole words
    compressor = ef.scaled_sign()
    bundles = bundles_of([compressor.codec] * 10, likes(shapes.values()), [None] * 10)
    assert [(b.kind, b.members) for b in bundles] == [
        ("group", (0, 2)),
        ("group", (1, 3, 8, 7)),  # whole words, in order of their size
        ("group", (4, 5)),
        ("leaf", (6,)),
        ("leaf", (9,)),
    ]
    run = together_and_each(compressor)
    rng = np.random.default_rng(1)
    grads = {k: jnp.asarray(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}
    for number, changed in enumerate(("a", "d", "g")):
        grads[changed] = jnp.zeros(shapes[changed]) if number % 2 else -grads[changed]
        together, each = run(grads)
        for key, grad in grads.items():
            room = 8 * np.finfo(np.float32).eps * float(jnp.max(jnp.abs(grad)))
            for one, other in zip(together, each[key], strict=True):
                np.testing.assert_allclose(one[key], other[key], rtol=0, atol=room, err_msg=key)


def test_the_message_with_zeros_is_cut_to_that_of_each_leaf():
    """Exact bits, and the same words again after the way there and back."""
    codec, sizes, row = ef.qsgd(7, key=0, bucket=20, norm="linf").codec, (143, 1, 320, 21), 160
    cut = padded.Cut(codec, jnp.float32, sizes, row)
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=size).astype(np.float32) for size in sizes]
    whole = padded.padded_to(sizes, row)
    vector = joined.as_vector(list(map(jnp.asarray, leaves)), offsets.begins(whole), whole)
    message = codec.encode(vector, jax.random.key(1))
    sent = cut.cut(message)
    assert fields.exact_bits(sent) == sum(codec.bits((size,)) for size in sizes)
    words = fields.from_words(fields.to_words(sent), sent)
    back = codec.decode(cut.whole(words), like_of(vector))
    want = codec.decode(message, like_of(vector))
    for start, size in zip(offsets.begins(whole), sizes, strict=True):
        np.testing.assert_array_equal(back[start : start + size], want[start : start + size])
        assert np.any(back[start : start + size])


def test_a_field_that_cannot_be_cut_is_refused_by_the_codec_s_name():
    @dataclasses.dataclass(frozen=True)
    class Whole(type(ef.qsgd(1, key=0).codec)):
        def encode(self, x, key=None):
            return {**super().encode(x, key), "all": jnp.max(x)[None]}

    codec = Whole(jax.random.key(0), 1, "linf", 16)
    with pytest.raises(TypeError, match=f"{codec.name} declares ignores_zeros"):
        padded.Cut(codec, jnp.float32, (5, 6), 128).cut(codec.encode(jnp.ones(256), codec.key))


@pytest.mark.parametrize("block", [0, -4, 2.5])
def test_blocks_without_a_length_are_refused(block):
    @dataclasses.dataclass(frozen=True)
    class Blocks(type(CODEC)):
        separable_into = block

    with pytest.raises((ValueError, TypeError), match="separable_into"):
        row_of(Blocks(k=1))


@pytest.mark.parametrize("make", [lambda: ef.block_top_k(k=3, block=128), ef.scaled_sign])
def test_the_largest_leaves_stay_apart_beyond_the_limit(monkeypatch, make):
    monkeypatch.setattr(joined, "JOINED_LIMIT", 1000)
    codec = make().codec
    shapes = [(896,), (256,), (512,), (3, 128), (640,)]
    bundles = bundles_of([codec] * 5, likes(shapes), [None] * 5)
    kinds = {b.members: b.kind for b in bundles}
    assert kinds == {(1, 3): "group", (0,): "leaf", (2,): "leaf", (4,): "leaf"}


# Shapes of one family, with indices of 7 bits: from the smallest to the largest size that has them.
FAMILY = {"a": (65,), "b": (8, 16), "c": (10, 10), "d": (3, 4, 7), "e": (8, 16)}


@pytest.mark.parametrize(
    ("compressor", "groups"),
    [
        pytest.param(ef.top_k(0.06), [(0, 1, 2, 3, 4)], id="top_k"),
        pytest.param(ef.block_top_k(0.06, block=100), [(0, 3), (1, 2, 4)], id="block_top_k"),
    ],
)
def test_small_leaves_of_a_family_get_what_each_gets_alone(compressor, groups):
    """Zeros that fill a row are never chosen, whatever the leaf holds; blocks are rows too."""
    run = together_and_each(compressor)
    bundles = bundles_of([compressor.codec] * 5, likes(FAMILY.values()), [None] * 5)
    assert [(b.kind, b.members) for b in bundles] == [("group", group) for group in groups]

    cases = {key: adversaries(int(np.prod(shape)), jnp.float32) for key, shape in FAMILY.items()}
    names = [name for name, x in cases["a"].items() if np.isfinite(np.asarray(x)).all()]
    assert "zero" in names
    for turn in range(len(names)):  # neighbours differ, in every turn
        chosen = {key: names[(turn + 3 * i) % len(names)] for i, key in enumerate(FAMILY)}
        grads = {
            key: np.asarray(cases[key][name]).reshape(FAMILY[key]) for key, name in chosen.items()
        }
        together, each = run(grads)
        for key in FAMILY:
            assert_same_bits([part[key] for part in together], [p[key] for p in each[key]], chosen)


########################################################################################
# Every mode
########################################################################################

WORKERS = 4


class Method(NamedTuple):
    compressor: ef.Compressor
    shapes: dict[str, tuple[int, ...]]
    block: int | None  # the length of the pieces of which each sends its largest entries


FAMILIES = Method(ef.top_k(0.01), {**SHAPES, "small": (7,), "smallest": (3, 2)}, None)
BLOCKS = Method(
    ef.block_top_k(k=3, block=64), {"a": (128,), "b": (3, 128), "c": (64, 4), "apart": (64,)}, 64
)


def gradients(method):
    rng, shapes = np.random.default_rng(3), method.shapes
    return {k: rng.normal(size=(WORKERS, *s)).astype(np.float32) for k, s in shapes.items()}


def oracle(method, grads):
    """Aggregates and residuals of two steps on the same gradients, piece by piece."""
    found = {}
    for name, g in grads.items():
        e, steps = np.zeros_like(g), []
        for _ in range(2):
            p = g + e
            sent = np.zeros_like(p)
            pieces = p.reshape(-1, method.block or p[0].size)
            k = max(1, -(-p[0].size // 100)) if method.block is None else 3
            for piece, out in zip(pieces, sent.reshape(pieces.shape), strict=True):
                kept = np.argsort(-np.abs(piece), kind="stable")[:k]
                out[kept] = piece[kept]
            e = p - sent
            steps.append((sent.astype(np.float64).mean(axis=0), e))
        found[name] = steps
    return found


def transformation(method, mode):
    tx = ef.error_feedback(method.compressor, axis_name="data")
    if mode == "simulate":
        return ef.simulate(tx, num_workers=WORKERS, axis_name="data")
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((WORKERS,), ("data",), (kind,), devices=jax.devices()[:WORKERS])
    return ef.data_parallel(tx, mesh, "data")


def by_lift(method, mode, grads):
    tx = transformation(method, mode)
    params = {k: jnp.zeros(g.shape[1:]) for k, g in grads.items()}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, state = jax.block_until_ready(step(grads, state, params))
        yield updates, state.residual


def by_hand(method, mode, grads):
    tx = ef.error_feedback(method.compressor, axis_name="data")
    params = {k: jnp.zeros(g.shape[1:]) for k, g in grads.items()}
    state = jax.tree.map(lambda x: jnp.stack([x] * WORKERS), tx.init(params))
    if mode == "pmap":
        step = jax.pmap(tx.update, axis_name="data", devices=jax.devices()[:WORKERS])
    else:
        mesh = jax.make_mesh(
            (WORKERS,), ("data",), (AxisType.Auto,), devices=jax.devices()[:WORKERS]
        )

        def local(g, s):
            out = tx.update(*jax.tree.map(lambda x: x[0], (g, s)))
            return jax.tree.map(lambda x: x[None], out)

        step = jax.jit(
            jax.shard_map(
                local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
            )
        )
    for _ in range(2):
        updates, state = jax.block_until_ready(step(grads, state))
        yield jax.tree.map(lambda x: x[0], updates), state.residual


def follows_the_oracle(method, mode):
    grads = gradients(method)
    run = by_hand if mode in ("pmap", "shard_map") else by_lift
    expected = oracle(method, grads)
    for step, (updates, residual) in enumerate(run(method, mode, grads)):
        for name in grads:
            mean, e = expected[name][step]
            np.testing.assert_allclose(updates[name], mean, rtol=1e-6, err_msg=name)
            np.testing.assert_array_equal(residual[name], e, err_msg=name)


EVERY_MODE = pytest.mark.parametrize(
    "mode",
    ["auto"]
    + [
        pytest.param(m, marks=pytest.mark.slow)
        for m in ("simulate", "explicit", "pmap", "shard_map")
    ],
)


@pytest.mark.usefixtures("everything_is_large")
@EVERY_MODE
def test_families_in_every_mode(mode):
    follows_the_oracle(FAMILIES, mode)


@EVERY_MODE
def test_joined_leaves_in_every_mode(mode):
    follows_the_oracle(BLOCKS, mode)


WITHIN = {"a": (33,), "b": (8, 8), "c": (7, 9), "d": (133,), "e": (5, 40), "f": (1,), "g": (3, 128)}


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=SLOW)])
@pytest.mark.parametrize(
    "compressor",
    [
        pytest.param(ef.scaled_sign(), id="scaled_sign"),
        pytest.param(ef.qsgd(7, key=0, bucket=16, norm="linf"), id="qsgd", marks=SLOW),
        pytest.param(ef.block_quantize(4, block=64), id="block_quantize", marks=SLOW),
        pytest.param(ef.block_top_k(0.1, block=50), id="block_top_k", marks=SLOW),
    ],
)
def test_leaves_that_end_within_a_block_on_a_mesh(compressor, kind):
    """The compiled program moves the exact bits in whole words; results are those simulated."""
    tx = ef.error_feedback(compressor, axis_name="data")
    mesh = jax.make_mesh((WORKERS,), ("data",), (kind,), devices=jax.devices()[:WORKERS])
    grads = gradients(Method(compressor, WITHIN, None))
    params = {name: np.zeros(shape, np.float32) for name, shape in WITHIN.items()}
    results = []
    for lifted in (ef.simulate(tx, WORKERS, "data"), ef.data_parallel(tx, mesh, "data")):
        state = lifted.init(params)
        program = compiled(jax.jit(lifted.update).lower(grads, state, params))
        for _ in range(2):
            updates, state = program(grads, state, params)
        results.append(updates)
    words = 2 + -(-ef.message_bits(compressor, params) // 32)  # with the header
    assert ef.wire_report(program).message_bytes == 4 * words
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


########################################################################################
# What it costs
########################################################################################

SIDE = 300  # matrices of 90,000 values, above every limit


@functools.cache
def program(count):
    tx = ef.error_feedback(ef.top_k(0.01))
    grads = likes([(SIDE, SIDE)] * count)
    state = jax.eval_shape(tx.init, grads)
    # The state first: donated buffers go to outputs of their shape in order.
    step = jax.jit(lambda g, s: tx.update(g, s)[::-1], donate_argnums=1)
    return compiled(step.lower(grads, state))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_the_residual_of_a_large_matrix_is_written_in_place(count):
    """No copy of a leaf, of its residual or of its update; there is room for bits and samples."""
    values = count * SIDE * SIDE
    memory = program(count).memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * values
    assert memory.temp_size_in_bytes <= 1.2 * values


def test_messages_are_not_kept_once_their_mean_is_made():
    """Eight messages take four bytes a value; the header at their end is needed until the end."""
    mesh, size = jax.make_mesh((8,), ("w",)), 1 << 18
    rule = ef.error_feedback(ef.qsgd(7, key=0, bucket=128), axis_name="w")
    tx = ef.data_parallel(optax.chain(rule, optax.trace(0.9), optax.trace(0.5)), mesh, "w")
    params = jax.device_put(jnp.zeros(size), NamedSharding(mesh, P()))
    state, by_worker = tx.init(params), NamedSharding(mesh, P("w"))
    grads = jax.ShapeDtypeStruct((8, size), jnp.float32, sharding=by_worker)
    with jax.set_mesh(mesh):
        step = jax.jit(tx.update, donate_argnums=1).lower(grads, state, params)
    mean_and_momenta = 3 * 4 * size
    assert compiled(step).memory_analysis().temp_size_in_bytes <= mean_and_momenta + size


@pytest.mark.slow
def test_more_equal_leaves_have_no_kernels_of_their_own():
    """Only code that joins the leaves depends on their number; nothing else compiles again."""
    few, many = (kernels_of(program(count).as_text()) for count in (3, 5))
    assert len(many) <= len(few) + 5


MANY = 2**31


@pytest.mark.parametrize("name", CASES)
def test_a_leaf_that_is_too_large_is_refused_by_name(name: str) -> None:
    """Or it is traced without positions that do not fit, which JAX would cut to 32 bits."""
    compressor, like = CASES[name].make(), {"embed": jax.ShapeDtypeStruct((MANY,), "float32")}
    run = functools.partial(jax.eval_shape, compressor.update, like, compressor.init(like))
    if compressor.codec.most_values < MANY:
        with pytest.raises(ValueError, match=r"'embed' has 2147483648 values.*per_leaf"):
            run()
    else:
        assert run()[0] == like


def test_leaves_are_counted_together_only_if_they_are_compressed_together() -> None:
    leaves = likes([(MANY // 2,), (MANY // 2,)]), [None] * 2, ["a", "b"]
    for apart in (ef.top_k(0.01), ef.power_sgd(2), ef.arc_top_k(0.1)):
        assert len(bundles_of([apart.codec] * 2, *leaves)) == 1  # which share a program
    with pytest.raises(ValueError, match="'a' and others together have 2147483648 values"):
        bundles_of([ef.global_top_k(0.01).codec] * 2, *leaves)
