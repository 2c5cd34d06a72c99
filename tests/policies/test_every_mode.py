"""Every policy in every mode: simulated, on a mesh of either kind, and through a checkpoint.

Those that are rules or compressors of the program are in the pool of rules, whose modes
tests/feedback/test_modes.py compares; here are the others, and the checkpoints of all.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from tests.feedback.rules import AXIS, RULES, SIGN, TOP, N, side_by_side

SHAPES = {"w": (4, 3), "b": (3,)}
STEPS = 4
LEVELS = [ef.top_k(k=k) for k in (1, 2, 3)]

POOLED = {
    "clip_residual",
    "delayed_start",
    "dense_steps",
    "dgc warm-up",
    "flush",
    "gradual",
    "hold_bytes",
    "hold_contraction",
    "rescale_residual",
    "reset_residual",
    "steer_residual",
}
"""The policies of the pool of rules."""


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of every worker; the last leaf is flat, so that a policy treats it in another way."""
    rng = np.random.default_rng(step)
    w = rng.standard_t(1.5, size=(N, *SHAPES["w"])).astype(np.float32)
    return {"w": w, "b": 1 + 0.1 * rng.normal(size=(N, *SHAPES["b"])).astype(np.float32)}


def chosen(name: str, *arguments: Any, **options: Any) -> Any:
    """Error feedback with levels that a policy on the host has chosen from worker 0's gradient."""
    example = {name: {leaf: x[0] for leaf, x in gradients(0).items()}}
    compressor = getattr(ef.policies, name)(example, LEVELS, *arguments, **options)
    return ef.error_feedback(compressor, axis_name=AXIS)


HERE = {
    "accordion": lambda: ef.error_feedback(
        ef.policies.accordion(
            TOP, SIGN, {"accordion": {"w": 1.0, "b": 4.0}}, {"accordion": {"w": 1.1, "b": 1.0}}
        ),
        axis_name=AXIS,
    ),
    "compressed_rate": lambda: ef.error_feedback(
        TOP, axis_name=AXIS, learning_rate=ef.policies.compressed_rate(0.1, 1, 0.5, ramp=2)
    ),
    "freeze": lambda: optax.chain(
        ef.compressed_mean(SIGN, axis_name=AXIS),
        ef.policies.freeze(optax.scale_by_adam(), ["nu"], 2),
    ),
    "l_greco": lambda: chosen("l_greco", 1),
    "with_contraction": lambda: chosen("with_contraction", alpha=0.6),
    "within_bytes": lambda: chosen("within_bytes", 20),
}


def tree(names: Any, of_leaf: Any) -> dict[str, dict[str, Any]]:
    return {name: {leaf: of_leaf(leaf) for leaf in SHAPES} for name in names}


@functools.cache
def simulated() -> tuple[Any, Any, list[Any], list[Any]]:
    """The transformation of all policies, its update, and updates and states of every step."""
    makers = HERE | {name: RULES[name] for name in POOLED}
    tx = ef.simulate(side_by_side({name: make() for name, make in makers.items()}), N, AXIS)
    update, state = jax.jit(tx.update), tx.init(tree(makers, lambda x: jnp.zeros(SHAPES[x])))
    updates, states = [], []
    for step in range(STEPS):
        out, state = update(tree(makers, gradients(step).get), state)
        updates.append(jax.device_get(out))
        states.append(state)
    return tx, update, updates, states


def test_no_policy_is_forgotten() -> None:
    found = {name for name in ef.policies.__all__ if inspect.isfunction(getattr(ef.policies, name))}
    assert found - {"dgc_warmup_ratio"} == HERE.keys() | POOLED - {"dgc warm-up"} | {"dgc_warmup"}


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # Optax's Adam mixes dtypes
@pytest.mark.parametrize("mode", ["auto", "explicit", "checkpoint"])
def test_every_policy_in_every_mode(mode: str, tmp_path: Path) -> None:
    tx, update, expected, states = simulated()
    if mode == "checkpoint":
        params = tree(expected[0], lambda x: jnp.zeros(SHAPES[x]))
        ef.save(tmp_path / "1", tx, params=params, opt_state=states[0], step=1)
        state = ef.restore(tmp_path / "1", tx, params=params).opt_state
        for step in range(1, STEPS):
            found, state = update(tree(expected[0], gradients(step).get), state)
            jax.tree.map(np.testing.assert_array_equal, found, expected[step])
        return
    kind = AxisType.Auto if mode == "auto" else AxisType.Explicit
    mesh = jax.make_mesh((N,), (AXIS,), (kind,), devices=jax.devices()[:N])
    lifted = ef.data_parallel(side_by_side({n: make() for n, make in HERE.items()}), mesh, AXIS)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        state = lifted.init(tree(HERE, lambda x: put(np.zeros(SHAPES[x], np.float32))))
        step_of = jax.jit(lifted.update)
        for step, wanted in enumerate(expected):
            placed = {leaf: put(x, AXIS) for leaf, x in gradients(step).items()}
            found, state = jax.block_until_ready(step_of(tree(HERE, placed.get), state))
            for name in HERE:
                for leaf in SHAPES:
                    np.testing.assert_allclose(
                        found[name][leaf], wanted[name][leaf], rtol=2e-5, atol=2e-6, err_msg=name
                    )
