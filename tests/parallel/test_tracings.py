"""How often a user's update is traced: all of it is a wait before the first step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import ef_optax as ef
from ef_optax.compressors.combine.identity import Identity

N = 4
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(5, np.float32)}
GRADS = {name: np.ones((N, *x.shape), np.float32) for name, x in PARAMS.items()}


def counting(axis_name, compressor) -> tuple[optax.GradientTransformation, list[int]]:
    """A chain whose flags take several passes to settle, and the list of its tracings."""
    tracings: list[int] = []

    def count(updates, state, params=None):
        del params
        tracings.append(1)
        first = jax.tree.leaves(updates)[0].sum()
        return updates, {"a": state["b"], "b": state["c"], "c": first}

    def init(params):
        del params
        return dict.fromkeys("abc", jnp.zeros(()))

    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    rules = [ef.error_feedback(compressor, axis_name=axis) for axis in reversed(axes)]
    chain = optax.chain(optax.GradientTransformation(init, count), *rules, optax.trace(0.5))
    return chain, tracings


def lifted(where: str, compressor: ef.Compressor | None = None):
    compressor = compressor or ef.top_k(k=1)
    if where == "two tiers":
        chain, tracings = counting(("pod", "data"), compressor)
        return ef.simulate(chain, (2, N // 2), ("pod", "data")), tracings
    chain, tracings = counting("data", compressor)
    if where == "simulate":
        return ef.simulate(chain, N, "data"), tracings
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])
    return ef.data_parallel(chain, mesh, "data"), tracings


@pytest.mark.parametrize(
    "where",
    ["simulate", "two tiers"]
    + [pytest.param(where, marks=pytest.mark.slow) for where in ("auto", "explicit")],
)
def test_once_at_init_and_once_at_the_first_update(where: str) -> None:
    tx, tracings = lifted(where)
    state = tx.init(PARAMS)
    assert len(tracings) == 1
    tx.init(PARAMS)
    tx.abstract_state(PARAMS)
    tx.state_specs(PARAMS)
    tx.worker_axes(PARAMS)
    assert len(tracings) == 1, "what follows from the shapes is known"
    update = jax.jit(tx.update)
    for _ in range(2):
        _, state = jax.block_until_ready(update(GRADS, state, PARAMS))
    assert len(tracings) == 2


def test_a_state_that_was_restored_costs_one_tracing_more() -> None:
    (one, _), (tx, tracings) = lifted("simulate"), lifted("simulate")
    state = one.init(PARAMS)
    jax.eval_shape(tx.update, GRADS, state, PARAMS)
    jax.eval_shape(tx.update, GRADS, state, PARAMS)
    assert len(tracings) == 2


@pytest.mark.parametrize("where", ["simulate", "auto", "explicit"])
def test_codecs_are_not_traced_again_at_the_first_update(where: str) -> None:
    """The map in which ``init`` finds what differs between workers looks like that of ``update``,
    so JAX knows the codecs of both leaves again."""
    tracings: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Counted(Identity):
        def encode(self, x, key=None):
            tracings.append(1)
            return super().encode(x, key)

    tx, _ = lifted(where, ef.Compressor(Counted()))
    state = tx.init(PARAMS)
    assert len(tracings) == len(PARAMS)
    jax.block_until_ready(jax.jit(tx.update)(GRADS, state, PARAMS))
    assert len(tracings) == len(PARAMS)


def test_other_shapes_are_another_question() -> None:
    tx, tracings = lifted("simulate")
    tx.abstract_state(PARAMS)
    tx.abstract_state({"w": np.ones(2, np.float32)})
    assert len(tracings) == 2
