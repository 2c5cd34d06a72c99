"""A compressor that changes with the step: the right stage, its bytes alone, its own state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._core.timeline import Timeline, merged

WORKERS = 3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Top-k of a flat array; k of None keeps everything."""
    out, order = np.zeros_like(x), np.argsort(-np.abs(x), kind="stable")[:k]
    out[order] = x[order]
    return out


def test_each_leaf_follows_its_own_schedule() -> None:
    """EF14 with a changing k, leaf by leaf, against NumPy; one compilation for all steps."""
    plans = {"a": [(0, None), (2, 4), (5, 1)], "b": [(0, 3)], "c": [(0, 6), (3, None)]}

    def policy(path: str, _) -> ef.Compressor:
        plan = plans[path]
        stages = [ef.identity() if k is None else ef.top_k(k=k) for _, k in plan]
        return ef.scheduled([start for start, _ in plan[1:]], stages)

    tx = ef.simulate(ef.error_feedback(ef.per_leaf(policy), axis_name="w"), WORKERS, "w")
    params = {name: jnp.zeros(10) for name in plans}
    state, update = tx.init(params), jax.jit(tx.update)
    memory = {name: np.zeros((WORKERS, 10), np.float32) for name in plans}
    for t in range(7):
        g = {name: normal(WORKERS, 10, seed=10 * t + i) for i, name in enumerate(plans)}
        out, state = update(g, state, params)
        for name, plan in plans.items():
            k = [k for start, k in plan if start <= t][-1]
            p = g[name] + memory[name]
            sent = np.stack([largest(row, k) for row in p])
            memory[name] = p - sent
            np.testing.assert_allclose(out[name], sent.mean(0), atol=1e-6)
            np.testing.assert_array_equal(state.residual[name], memory[name])
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "lines",
    [
        [Timeline()],
        [Timeline((3, 7), 7)],
        [Timeline((2, 5), 0, 5)],
        [Timeline((4, 6, 9), 4, 5), Timeline((1, 2), 0, 2)],
        [Timeline((5,), 5), Timeline((3, 4, 6), 3, 3), Timeline((2, 4), 0, 4)],
    ],
)
def test_timelines(lines: list[Timeline]) -> None:
    """Nothing changes within a segment, and steps of one segment are in the same phases."""

    def phase(line: Timeline, step: int) -> int:
        """Counted by hand: changes so far, with those of the period counted again each round."""
        if step >= line.settled:
            step = line.settled + (step - line.settled) % line.period
        return sum(change <= step for change in line.changes)

    both = merged(lines)
    segments = np.asarray(jax.vmap(both.segment)(jnp.arange(60)))
    seen = {}
    for step, segment in enumerate(segments):
        now = tuple(phase(line, step) for line in lines)
        assert seen.setdefault(int(segment), now) == now
        assert seen[int(segment)] == tuple(phase(x, both.starts()[segment]) for x in lines)


def test_only_the_active_state_moves() -> None:
    """PowerSGD's directions wait for their stage, then continue from where they were."""
    x = jnp.asarray(normal(12, 10))
    plain, late = ef.power_sgd(2), ef.scheduled([2], [ef.top_k(0.5), ef.power_sgd(2)])
    expected, before = plain.init(x), late.init(x)
    update, update_plain = jax.jit(late.update), jax.jit(plain.update)
    for step in range(4):
        out, state = update(x, before)
        if step < 2:
            assert np.count_nonzero(out) == 60
            assert np.array_equal(state.codec[1], expected.codec)
        else:
            wanted, expected = update_plain(x, expected)
            np.testing.assert_allclose(out, wanted, atol=1e-5)
            np.testing.assert_allclose(state.codec[1], expected.codec, rtol=1e-5)
        before = state


@pytest.mark.slow
def test_only_the_active_stage_is_paid(mesh4) -> None:
    """Each branch of the compiled program moves the bytes of its own codec and no others."""
    stages = [ef.identity(), ef.top_k(0.2), ef.scaled_sign()]
    tx = ef.data_parallel(
        ef.error_feedback(ef.scheduled([2, 5], stages), axis_name="data"), mesh4, "data"
    )
    params = jnp.zeros(1000)
    lowered = jax.jit(tx.update).lower(jnp.zeros((4, 1000)), tx.init(params), params)
    report = ef.wire_report(lowered.compile())
    assert all(c.conditional for c in report.collectives)
    found = sorted((c.kind, 8 * c.message_bytes) for c in report.of("gather").collectives)
    header = 64
    wanted = [(32 + 1000, 2), (200 * (32 + 10), 2)]  # bits, packed fields
    for (kind, bits), (message, fields) in zip(found, wanted, strict=True):
        assert kind == "gather" and message <= bits - header < message + 32 * fields
    dense = report.of("reduce")
    assert sum(c.message_bytes for c in dense.collectives) == 4 * (1000 + 1)


def test_a_schedule_in_a_schedule() -> None:
    """All stages count the same steps; the boundaries of a finished stage do not matter."""
    inner = ef.scheduled([1, 3, 9], [ef.top_k(k=k) for k in (9, 8, 7, 6)])
    outer = ef.scheduled([2, 6], [ef.top_k(k=1), inner, ef.top_k(k=2)])
    assert outer.codec.stages.timeline.starts() == (0, 2, 3, 6)
    x, kept = np.arange(1, 11, dtype=np.float32), []
    state, update = outer.init(x), jax.jit(outer.update)
    for _ in range(8):
        out, state = update(x, state)
        kept.append(np.count_nonzero(out))
    assert kept == [1, 1, 8, 7, 7, 7, 2, 2]


def test_a_skipped_step_does_not_count() -> None:
    tx = ef.error_feedback(ef.scheduled([1], [ef.identity(), ef.top_k(k=1)]), axis_name="w")
    tx = ef.simulate(tx, 2, "w")
    params, good = jnp.zeros(3), jnp.asarray([[3.0, 2.0, 1.0]] * 2)
    _, state = tx.update(good * jnp.nan, tx.init(params), params)
    first, state = tx.update(good, state, params)
    second, _ = tx.update(good, state, params)
    assert first.tolist() == [3, 2, 1] and second.tolist() == [3, 0, 0]


def test_leaves_that_never_change_have_no_schedule() -> None:
    """Small leaves that are dense in every stage stay ``identity``, which rules may ask for."""

    def stage(k: int) -> ef.Compressor:
        return ef.per_leaf(lambda _, leaf: ef.identity() if leaf.ndim < 2 else ef.top_k(k=k))

    codec = ef.scheduled([3], [stage(2), stage(1)]).codec
    vector, matrix = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(7,), (3, 3)])
    assert codec.for_leaf("b", vector) == ef.identity().codec
    assert codec.for_leaf("w", matrix).stages.timeline.starts() == (0, 3)


def test_declared_properties_are_those_of_all_stages() -> None:
    random, top = ef.random_k(0.5, 0, scaled=True), ef.top_k(0.25)
    both = ef.scheduled([3], [random, top]).codec
    assert not both.unbiased and not both.linear and not both.deterministic and not both.stateful
    assert both.alpha((8,)) is None and both.omega((8,)) is None
    tops = ef.scheduled([3], [ef.top_k(0.5), top]).codec
    assert tops.deterministic and tops.alpha((8,)) == 0.25
    randoms = ef.scheduled([3], [random, ef.identity()]).codec
    assert randoms.unbiased and randoms.linear and randoms.omega((8,)) == 1
    assert both.bits((8,)) == top.bits((8,)) and both.at(2).bits((8,)) == random.bits((8,))
    assert not ef.scheduled([1], [ef.exchanges.majority_vote(), top]).codec.additive
    late = ef.scheduled([1], [top, ef.power_sgd(1)]).codec
    assert both.independent and late.stateful and not late.independent
    assert ef.message_bits(ef.scheduled([3], [random, top]), jnp.zeros(8)) == top.bits((8,))


@pytest.mark.parametrize("wrap", [ef.fcc, ef.exchanges.two_shot, ef.compose, ef.induced, ef.rotate])
def test_inside_another_compressor_it_is_refused(wrap) -> None:
    """These encode for one worker alone; the schedule goes around them instead."""
    late = ef.scheduled([1], [ef.scaled_sign(), ef.top_k(0.5)])
    more = {ef.fcc: [2], ef.exchanges.two_shot: [], ef.rotate: [0]}.get(wrap, [ef.top_k(0.5)])
    with pytest.raises(TypeError, match="single leaves"):
        wrap(late, *more)
    with pytest.raises(TypeError, match=r"codec.at\(step\)"):
        late.codec.encode(jnp.ones(3))


@pytest.mark.parametrize(
    ("boundaries", "count", "message"),
    [
        ([0], 2, "increase from 1"),
        ([3, 3], 3, r"boundaries=\[3, 3\]"),
        ([2.0], 2, "whole numbers"),
        ([2], 3, "3 entries, but 1 boundaries make 2 stages"),
        ([], 0, "0 entries"),
    ],
)
def test_bad_arguments(boundaries, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ef.scheduled(boundaries, [ef.identity()] * count)
    with pytest.raises(TypeError, match=r"compressors\[1\]"):
        ef.scheduled([2], [ef.identity(), ef.identity().codec])
