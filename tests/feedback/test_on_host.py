"""Memories on the host: the same numbers, in the other memory whenever no step is computed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax._rules import resting
from ef_optax.extend import Memory, Stored

N, AXIS, STEPS = 3, "data", 4
PARAMS = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(5), "none": jnp.zeros((0, 2))}
SPECS = {"w": P(None, "model"), "b": P(), "none": P()}


def rate(step: Any) -> Any:
    """Zero in the third step, in which the residual stays as it is stored."""
    return jnp.asarray([0.5, 0.25, 0.0, 0.5])[step]


def gradients(lead: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.normal(size=(*lead, *p.shape)), jnp.float32)  # noqa: E731
    steps = [jax.tree.map(draw, PARAMS) for _ in range(STEPS)]
    steps[1]["b"] = steps[1]["b"].at[..., 0].set(jnp.nan)  # all workers skip it
    return steps


def rule(memory: Any, axis: str | None) -> Any:
    return ef.error_feedback(ef.top_k(k=3), axis_name=axis, memory=memory, learning_rate=rate)


def lifted(where: str, memory: Any) -> tuple[Any, tuple[int, ...]]:
    if where == "alone":
        return ef.parallel.guard(rule(memory, None)), ()
    if where == "simulate":
        return ef.simulate(rule(memory, AXIS), N, AXIS), (N,)
    mesh = jax.make_mesh((N, 2), (AXIS, "model"), devices=jax.devices()[: 2 * N])
    return ef.data_parallel(rule(memory, AXIS), mesh, AXIS, SPECS), (N,)


@functools.cache
def run(where: str, memory: Any) -> tuple[list[Any], list[Any]]:
    """What is emitted in each step, and all states, of which a step may overwrite the last."""
    tx, lead = lifted(where, memory)
    state = tx.init(PARAMS)
    emitted, states = [], [jax.tree.map(jnp.copy, state)]
    update = jax.jit(tx.update, donate_argnums=1)
    for g in gradients(lead):
        updates, state = jax.block_until_ready(update(g, state, PARAMS))
        emitted.append(jax.device_get(updates))
        states.append(jax.tree.map(jnp.copy, state))
    assert update._cache_size() <= 2  # the first state has not been on a device of its own
    return emitted, states


FORMATS = {
    "float32": (None, None),
    "bfloat16": ("bfloat16", ef.cast("bfloat16")),
    "8 bits": (ef.block_quantize(8, block=4), ef.block_quantize(8, block=4)),
}
"""What is given to ``on_host``, and the same without the host."""


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("alone", "float32"),
        pytest.param("mesh", "float32", marks=pytest.mark.slow),
        pytest.param("simulate", "8 bits", marks=pytest.mark.slow),
        pytest.param("alone", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_host_changes_no_number(where: str, name: str) -> None:
    """With steps that are skipped, and states that are donated; each bit, and where it lies."""
    given, plain = FORMATS[name]
    emitted, states = run(where, ef.on_host(given))
    expected, others = run(where, plain)
    jax.tree.map(np.testing.assert_array_equal, emitted, expected)
    for one, other in zip(states, others, strict=True):
        for leaf in ("w", "b"):
            kept = one.residual[leaf]
            assert {x.sharding.memory_kind for x in jax.tree.leaves(kept.message)} == {resting.HOST}
            counts = {x.sharding.memory_kind for x in jax.tree.leaves(kept.lost)}
            assert resting.HOST not in counts and (name == "float32") == (not counts)
            np.testing.assert_array_equal(values(kept), values(other.residual[leaf]))
    assert np.abs(values(states[-1].residual["w"])).max() > 0
    assert int(states[-1].exchange.skipped) == 1


def values(kept: Any) -> np.ndarray:
    """What is remembered of a leaf; of one that is split over devices, slice by slice."""
    if not isinstance(kept, Stored):
        return np.asarray(kept)
    if not kept.form.sliced:
        return np.asarray(kept.wide())
    parts = np.asarray(kept.message).reshape(N, 2, 4, 3)  # float32 as it is
    return np.concatenate([parts[:, 0], parts[:, 1]], 2)


@pytest.mark.slow
def test_checkpoints_and_other_workers_find_it_there(tmp_path: Any) -> None:
    memory = ef.on_host(ef.block_quantize(8, block=4))
    tx, _ = lifted("simulate", memory)
    state = run("simulate", memory)[1][-1]
    ef.save(tmp_path / "1", tx, params=PARAMS, opt_state=state)
    again = ef.restore(tmp_path / "1", tx, params=PARAMS).opt_state
    jax.tree.map(np.testing.assert_array_equal, again, state)
    two = ef.simulate(rule(memory, AXIS), 2, AXIS)
    fewer = ef.parallel.change_workers(state, two.init(PARAMS))
    before, after = (np.asarray(Memory.read(s.residual["w"])) for s in (state, fewer))
    assert after.shape == (2, 4, 6)
    np.testing.assert_allclose(after.mean(0), before.mean(0), atol=np.abs(before).max() / 127)
    for one in (again, fewer):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(one.residual["w"].message)}
        assert kinds == {resting.HOST}


@pytest.mark.slow
def test_the_monitor_and_the_points_read_it() -> None:
    chain = ef.monitor(rule(ef.on_host(), None))
    _, state = chain.update(gradients(())[0], chain.init(PARAMS), PARAMS)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(Memory.read(state.residual))))
    assert ef.measure.summary(state)["residual_norm"] == pytest.approx(norm, rel=1e-6)
    found = ef.measure.memory_statistics(state, PARAMS)
    assert found["residual/norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "device", "host"),
    [(None, 4.0, 0.0), (ef.on_host(), 0.0, 4.0), (ef.on_host("bfloat16"), 0.0, 2.0)],
    ids=["device", "host", "host, bfloat16"],
)
def test_bytes_of_both_memories(memory: Any, device: float, host: float) -> None:
    like = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    tx = ef.simulate(ef.error_feedback(ef.top_k(0.01), memory=memory, axis_name=AXIS), 2, AXIS)
    size = functools.partial(ef.measure.state_bytes, tx, like)
    assert size(space="device") == pytest.approx(device, abs=1e-4)
    assert size(space="host") == host
    assert size() == size(space="device") + size(space="host")


def test_devices_without_the_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        device_kind, platform = "toy", "toys"

        @staticmethod
        def addressable_memories() -> list[Any]:
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(ValueError, match="toy devices of platform 'toys' have no 'pinned_host'"):
        ef.error_feedback(ef.top_k(0.1), memory=ef.on_host()).init(PARAMS)
