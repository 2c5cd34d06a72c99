"""HSDP, the recommended set-up: split over the fast axis, compressed messages over the slow one."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax._exchange.rounds import HEADER_WORDS

pytestmark = pytest.mark.usefixtures("standard_promotion")

SLOW, FAST = 2, 4
SPECS = {"up": P(None, "fsdp"), "bias": P("fsdp"), "down": P("fsdp")}
SHAPES = {"up": (16, 64), "bias": (64,), "down": (64, 8)}
SLICES = {"up": (16, 16), "bias": (16,), "down": (16, 8)}  # what a device owns of each
BATCH = 32
C = ef.compose(ef.sigma_bins(2), ef.block_top_k(0.1, block=64))


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"])
    return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)


@functools.cache
def trained(kind: AxisType):
    """Some steps of Adam on a 2 x 4 mesh: losses, parameters and state, the compiled step."""
    mesh = jax.make_mesh((SLOW, FAST), ("dcn", "fsdp"), axis_types=(kind, kind))
    tx = optax.chain(ef.error_feedback(C, axis_name="dcn"), optax.adam(1e-2))
    tx = ef.data_parallel(tx, mesh, "dcn", param_specs=SPECS)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    params = {name: 0.3 * draw(*shape) for name, shape in SHAPES.items()}
    params = {n: jax.device_put(p, NamedSharding(mesh, SPECS[n])) for n, p in params.items()}
    rows = NamedSharding(mesh, P(("dcn", "fsdp")))  # the batch is split over both axes
    batch = jax.device_put({"x": draw(BATCH, 16), "y": draw(BATCH, 8)}, rows)
    value_and_grad = ef.worker_value_and_grad(loss, mesh, "dcn")

    def step(params, state, batch):
        losses, grads = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    curve = []
    for _ in range(20):
        params, state, losses = compiled(params, state, batch)
        curve.append(np.mean(losses))
    return curve, params, state, compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_only_messages_cross_the_slow_axis(kind: AxisType) -> None:
    """Read from the compiled step: over groups of two, one gather of each device's own slices."""
    curve, _, _, compiled = trained(kind)
    assert curve[-1] < 0.5 * curve[0]
    report = ef.wire_report(compiled)
    (gather,) = report.over(SLOW).collectives
    bits = sum(C.bits(shape) for shape in SLICES.values())
    assert gather.kind == "gather"
    assert gather.message_bytes == 4 * (HEADER_WORDS + math.ceil(bits / 32))
    dense = 4 * sum(math.prod(shape) for shape in SLICES.values())
    assert 8 * gather.message_bytes < dense
    assert all(c.group_size == FAST for c in report.collectives if c is not gather)


def test_memory_of_a_device_is_as_planned() -> None:
    """A fourth of the parameters, of both moments and of the worker's residual; nothing whole."""
    _, params, state, compiled = trained(AxisType.Auto)
    own = 4 * sum(math.prod(shape) for shape in SLICES.values())
    device = jax.devices()[0]

    def held(tree) -> int:
        return sum(
            shard.data.nbytes
            for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards
            if shard.device == device
        )

    assert held(params) == held(state[0].residual) == own
    assert held((state[1][0].mu, state[1][0].nu)) == 2 * own
    counters = held(state) - 3 * own
    assert counters < 32
    rows = 4 * BATCH // (SLOW * FAST) * (16 + 8)
    memory = compiled.memory_analysis()
    unused = 4 * own + counters + rows - memory.argument_size_in_bytes
    assert 0 <= unused < 4  # the flag of the last step is written and not read
    leaves = ef.measure.planner.leaves_of({n: np.zeros(s) for n, s in SLICES.items()})
    method = ef.measure.planner.Method("hsdp", C)
    assert ef.measure.planner.state_bytes(method, leaves, SLOW) == held(state[0].residual)
