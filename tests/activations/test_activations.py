"""What crosses a cut: against NumPy, in one process and between the devices of a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax.activations import aq_sgd, compress_activations
from tests.conftest import make_mesh
from tests.oracles.activations import AQSGD, nearest

BATCH, WIDTH, EXAMPLES = 3, 40, 6
FOUR, EIGHT = ef.block_quantize(4, block=None), ef.block_quantize(8, block=None)
ROUNDED = ef.block_quantize(4, key=3)  # a memory that is rounded at random
EPOCHS = [[0, 1, 2], [3, 0, 4], [5, 1, 2], [2, 0, 1], [1, 3, 5], [4, 5, 3]]
FIRST = 3  # batches with an example that was never sent
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
NOISE = 0.1 * RNG.normal(size=(len(EPOCHS), BATCH, WIDTH)).astype(np.float32)
XS = [BASE[index] + noise for index, noise in zip(EPOCHS, NOISE, strict=True)]
TARGET = RNG.normal(size=(BATCH, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def stages() -> jax.sharding.Mesh:
    return make_mesh((2,), ("stage",))


def loss_of(y: Any) -> Any:
    """Its gradient with respect to y is ``y - TARGET``."""
    return 0.5 * jnp.sum(jnp.square(y - TARGET))


def step_of(cut: Any, axis: str | None = None) -> Any:
    """``(x, state, index) -> (y, gradient of x, state)``; only the last stage has a loss."""

    def loss(x: Any, state: Any, index: Any) -> Any:
        y, state = cut.apply(x, state, index)
        last = True if axis is None else jax.lax.axis_index(axis) == 1
        return jnp.where(last, loss_of(y), 0.0), (y, state)

    def step(x: Any, state: Any, index: Any) -> Any:
        (_, (y, state)), gradient = jax.value_and_grad(loss, has_aux=True)(x, state, index)
        return y, gradient, state

    return step


def run(step: Any, state: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """All batches: what was received, the gradients that came back, the last state."""
    ys, gradients = [], []
    for x, index in zip(XS, EPOCHS, strict=True):
        y, gradient, state = jax.block_until_ready(step(x, state, np.int32(index)))
        ys.append(y)
        gradients.append(gradient)
    return np.stack(ys), np.stack(gradients), state


@functools.cache
def in_one_process(memory: Any = None) -> tuple[np.ndarray, np.ndarray, Any]:
    cut = aq_sgd(FOUR, EIGHT, num_examples=EXAMPLES, memory=memory)
    return run(jax.jit(step_of(cut)), cut.init(XS[0]))


@functools.cache
def on_a_mesh() -> tuple[jax.stages.Compiled, Any]:
    """The step of two stages, each with its own state: compiled, and its outcome."""
    mesh = make_mesh((2,), ("stage",))
    cut = aq_sgd(FOUR, EIGHT, num_examples=EXAMPLES, memory=ROUNDED, axis_name="stage")
    one = step_of(cut, "stage")

    def start(x: Any) -> Any:
        return jax.tree.map(lambda field: field[None], cut.init(x))

    def step(x: Any, state: Any, index: Any) -> Any:
        first = jax.lax.axis_index("stage") == 0  # other stages hold no activations of their own
        own = jnp.where(first, x, 7.0), jax.tree.map(lambda field: field[0], state)
        return jax.tree.map(lambda out: out[None], one(*own, jnp.where(first, index, -1)))

    rows, whole = P("stage"), P()
    state = jax.jit(jax.shard_map(start, mesh=mesh, in_specs=whole, out_specs=rows))(XS[0])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows)
    compiled = jax.jit(mapped).lower(XS[0], state, np.int32(EPOCHS[0])).compile()
    return compiled, run(compiled, state)


########################################################################################
# AQ-SGD
########################################################################################


def test_aq_sgd_against_numpy() -> None:
    ys, gradients, state = in_one_process()
    oracle = AQSGD(nearest(4))
    expected = np.stack([oracle.forward(x, index) for x, index in zip(XS, EPOCHS, strict=True)])
    np.testing.assert_allclose(ys, expected, atol=1e-6)
    back = [nearest(8)(row) for y in ys for row in y - TARGET]
    np.testing.assert_allclose(gradients.reshape(-1, WIDTH), back, atol=1e-6)
    np.testing.assert_allclose(state.memory, [oracle.m[s] for s in range(EXAMPLES)], atol=1e-6)
    assert (ys[:FIRST] == XS[:FIRST]).all() and (ys[FIRST:] != XS[FIRST:]).any(axis=(1, 2)).all()
    assert state.seen.all() and state.step == len(EPOCHS)


@pytest.mark.parametrize("memory", ["bfloat16", ef.block_quantize(4, block=None)], ids=str)
def test_a_narrow_memory_against_numpy(memory: Any) -> None:
    """The receiver goes on with m(s) before it is rounded; the next difference is from after."""
    ys, _, _ = in_one_process(memory)
    narrow = lambda m: m.astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    oracle = AQSGD(nearest(4), narrow if memory == "bfloat16" else nearest(4))
    expected = np.stack([oracle.forward(x, index) for x, index in zip(XS, EPOCHS, strict=True)])
    np.testing.assert_allclose(ys, expected, atol=1e-6)


def test_a_mesh_is_one_process_and_both_ends_agree() -> None:
    _, (ys, gradients, state) = on_a_mesh()
    expected, back, _ = in_one_process(ROUNDED)
    np.testing.assert_allclose(ys[:, 1], expected, atol=1e-6)
    np.testing.assert_allclose(gradients[:, 0], back, atol=1e-6)
    assert (ys[:, 0] == 0).all() and (gradients[:, 1] == 0).all()
    for field in jax.tree.leaves(state.memory):  # to the bit, random rounding included
        assert (field[0] == field[1]).all()
    assert state.seen[0].all() and not state.seen[1].any()


def test_packed_messages_cross_and_dense_ones_only_at_first_visits() -> None:
    compiled, _ = on_a_mesh()
    sent = ef.wire_report(compiled).of("permute").collectives
    exact = {
        "dense": BATCH * (32 * WIDTH + 32),
        "difference": BATCH * (FOUR.bits((WIDTH,)) + 32),
        "gradient": BATCH * EIGHT.bits((WIDTH,)),
    }
    words = {name: 4 * -(-bits // 32) for name, bits in exact.items()}
    assert sorted(c.message_bytes for c in sent if c.conditional) == sorted(
        [words["dense"], words["difference"]]
    )
    assert [c.message_bytes for c in sent if not c.conditional] == [words["gradient"]]


def test_with_the_identity_it_is_plain() -> None:
    cut = aq_sgd(ef.identity(), num_examples=EXAMPLES)
    ys, gradients, _ = run(jax.jit(step_of(cut)), cut.init(XS[0]))
    np.testing.assert_allclose(ys, XS, atol=1e-6)
    np.testing.assert_allclose(gradients, np.stack(XS) - TARGET, atol=1e-6)


def test_the_error_shrinks_while_the_activations_stay() -> None:
    """What direct quantisation never does."""
    cut, direct = aq_sgd(FOUR, num_examples=EXAMPLES), jax.jit(compress_activations(FOUR))
    step, index = jax.jit(cut.apply), np.arange(EXAMPLES)
    _, state = step(BASE + 1, cut.init(BASE), index)
    errors = []
    for _ in range(4):
        y, state = step(BASE, state, index)
        errors.append(float(np.abs(y - BASE).max()))
    assert errors[3] < errors[0] / 100 and errors[3] < np.abs(direct(BASE) - BASE).max() / 100


def test_what_is_not_finite_and_padding_is_not_remembered() -> None:
    cut = aq_sgd(FOUR, num_examples=EXAMPLES)
    step, index = jax.jit(cut.apply), np.array([0, -1, 2])
    y, state = step(XS[0], cut.init(XS[0]), index)
    assert (y == XS[0]).all() and state.seen.tolist() == [True, False, True, False, False, False]
    assert (state.memory[1] == 0).all() and (state.memory[0] == XS[0][0]).all()
    bad = XS[1].copy()
    bad[0, 3] = np.nan
    y, after = step(bad, state, index)
    assert np.isnan(y[0]).any() and (after.memory[0] == state.memory[0]).all()
    assert (after.memory[2] != state.memory[2]).any()


def test_a_stage_between_two_others_remembers_both_links() -> None:
    """Three stages as axes of ``vmap``: each link is an AQ-SGD of its own."""
    cut = aq_sgd(FOUR, num_examples=EXAMPLES, axis_name="stage")
    step = jax.jit(jax.vmap(cut.apply, axis_name="stage"))
    state = jax.vmap(lambda x: cut.init(x), axis_name="stage")(np.stack([XS[0]] * 3))
    links = [AQSGD(nearest(4)), AQSGD(nearest(4))]
    order = np.roll(EPOCHS, 1, axis=1)
    for x, first, second in zip(XS, EPOCHS, order, strict=True):
        index = np.stack([first, second, np.full(BATCH, -1)]).astype(np.int32)
        y, state = step(np.stack([x, 2 * x, x]), state, index)
        assert (y[0] == 0).all()
        np.testing.assert_allclose(y[1], links[0].forward(x, first), atol=1e-6)
        np.testing.assert_allclose(y[2], links[1].forward(2 * x, second), atol=1e-6)
    assert state.memory.shape == (3, 2 * EXAMPLES, WIDTH)


def test_all_groups_of_a_mesh_send_dense_together() -> None:
    """Else the devices of one group would wait for those of the other."""
    mesh = make_mesh((2, 2), ("data", "stage"))
    cut = aq_sgd(FOUR, num_examples=EXAMPLES, axis_name="stage")

    def both(x: Any, index: Any) -> Any:
        x, index = x[0], index[0]
        y, state = cut.apply(x, cut.init(x), index[0])
        return cut.apply(2 * x, state, index[1])[0][None, None]

    index = np.array([[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [3, 4, 5]]])  # the second group: others
    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data", "stage")
    )
    y = jax.jit(mapped)(np.stack(XS[:2]), index)
    assert (y[:, 1] == 2 * np.stack(XS[:2])).all()


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(None, 4), ("bfloat16", 2), (ef.block_quantize(4, block=128), 0.53)],
    ids=["float32", "bfloat16", "4 bits"],
)
def test_bytes_of_the_memory(memory: Any, expected: float) -> None:
    cut = aq_sgd(FOUR, num_examples=50, memory=memory)
    state = jax.eval_shape(cut.init, jax.ShapeDtypeStruct((2, 16, 64), jnp.bfloat16))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.memory))
    assert size / (50 * 16 * 64) == pytest.approx(expected, rel=0.02)


########################################################################################
# Direct compression
########################################################################################


def crossed(forward: Any, backward: Any, mesh: Any) -> Any:
    """``x -> (y, gradient of x)`` over two stages; the last one's loss is ``loss_of``."""
    cut = compress_activations(forward, backward, axis_name="stage")

    def one(x: Any) -> Any:
        def loss(x: Any) -> Any:
            y = cut(x)
            return jnp.where(jax.lax.axis_index("stage") == 1, loss_of(y), 0.0), y

        gradient, y = jax.grad(loss, has_aux=True)(jax.lax.pcast(x, "stage", to="varying"))
        return y[None], gradient[None]

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P(), out_specs=P("stage")))


def test_direct_compression_against_numpy(stages: Any) -> None:
    step = crossed(ef.top_k(k=4), EIGHT, stages)
    y, gradient = step(XS[0])
    kept = np.sort(np.abs(XS[0]), axis=1)[:, -4:-3]
    expected = np.where(np.abs(XS[0]) >= kept, XS[0], 0)
    np.testing.assert_array_equal(y[1], expected)
    np.testing.assert_allclose(
        gradient[0], [nearest(8)(row) for row in expected - TARGET], atol=1e-6
    )
    report = ef.wire_report(step.lower(XS[0]).compile()).of("permute")
    bits = [BATCH * ef.top_k(k=4).bits((WIDTH,)), BATCH * EIGHT.bits((WIDTH,))]
    assert sorted(c.message_bytes for c in report.collectives) == sorted(
        4 * -(-count // 32) for count in bits
    )


def test_the_identity_is_a_plain_ppermute(stages: Any) -> None:
    y, gradient = crossed(ef.identity(), None, stages)(XS[0])
    assert (y[1] == XS[0]).all() and (y[0] == 0).all()
    assert (gradient[0] == XS[0] - TARGET).all() and (gradient[1] == 0).all()


def test_activations_keep_their_dtype_and_draw_new_numbers_at_every_step() -> None:
    cut = compress_activations(ef.block_quantize(4, key=0), EIGHT)
    step, x = jax.jit(cut), jnp.asarray(np.stack([XS[0][0]] * 2), jnp.bfloat16)
    one, same, other = step(x, 1), step(x, 1), step(x, 2)
    assert one.dtype == jnp.bfloat16 and (one == same).all() and (one != other).any()
    assert (one[0] != one[1]).any()  # each example has its own noise
    with pytest.raises(ValueError, match="step=None must be the number of the step"):
        cut(x)


def test_mistakes_are_refused() -> None:
    for pairs in ([(0, 1), (0, 2)], [(0, 1), (2, 1)], [], [(0, -1)], "ab", 3, [(0, 1, 2)]):
        with pytest.raises(ValueError, match="pairs="):
            compress_activations(FOUR, axis_name="stage", pairs=pairs)
    with pytest.raises(ValueError, match="is not a stateless compressor"):
        compress_activations(ef.power_sgd(2))
    with pytest.raises(TypeError, match="backward=top_k is a function"):
        aq_sgd(FOUR, ef.top_k, num_examples=3)
    with pytest.raises(NameError, match="inside jax.shard_map over that axis"):
        compress_activations(FOUR, axis_name="stage")(XS[0])
    with pytest.raises(TypeError, match="must be a floating-point array whose first axis"):
        compress_activations(FOUR)(jnp.arange(3))
    cut = aq_sgd(FOUR, num_examples=EXAMPLES)
    for index in (np.arange(2), np.zeros(BATCH)):
        with pytest.raises(ValueError, match="must be the whole numbers of the 3 examples"):
            cut.apply(XS[0], cut.init(XS[0]), index)
    far = compress_activations(FOUR, axis_name="stage", pairs=[(0, 5)])
    with pytest.raises(ValueError, match="must be of stages below 2"):
        jax.vmap(far, axis_name="stage")(np.stack(XS[:2]))


def test_a_ring_sends_to_the_first_stage_too() -> None:
    cut = compress_activations(ef.identity(), axis_name="stage", pairs=[(0, 1), (1, 2), (2, 0)])
    y = jax.jit(jax.vmap(cut, axis_name="stage"))(np.stack(XS[:3]))
    np.testing.assert_array_equal(y, np.stack([XS[2], XS[0], XS[1]]))
