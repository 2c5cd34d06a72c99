"""Real processes over localhost follow the trajectory of one process to the last bit."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.paths import ROOT

STEPS, TIMEOUT = 10, 300
SUMMED = ("marina", "power_sgd")
"""Rules with numbers that travel by an all-reduce: the backend chooses its order of additions, and
the power iteration magnifies the rounding. Two numbers have only one sum."""

# Run with: process id, number of processes, port, output file, steps. Each process holds only its
# own share of the batch, and writes what it can see of the result: the parameters and the whole
# state of every rule; of an array that differs between workers, the rows of its own workers.
PROGRAM = """
import sys
import jax
import numpy as np

process, processes, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process, initialization_timeout=60)

import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
import ef_optax as ef

n, steps = jax.device_count(), int(sys.argv[5])
mesh = jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
codecs = {"t": ef.top_k(0.3), "s": ef.scaled_sign(), "r": ef.random_k(0.3, key=1)}
policy = ef.per_leaf(lambda path, like: codecs[path])
unbiased = ef.random_k(0.5, key=2, scaled=True)
low_rank = ef.power_sgd(1, local_error=True)
shot = ef.exchanges.two_shot(ef.scaled_sign())
rules = {
    "error_feedback": optax.chain(optax.trace(0.5), ef.error_feedback(policy, axis_name="data")),
    "power_sgd": ef.error_feedback(low_rank, axis_name="data"),
    "ef21": ef.ef21(ef.top_k(0.3), axis_name="data"),
    "marina": ef.marina(unbiased, 0.3, key=3, axis_name="data"),
    "dgc": ef.dgc(ef.top_k(0.3), clip_norm=3.0, axis_name="data"),
    "two_shot": ef.error_feedback(shot, axis_name="data"),
}

def loss(params, batch):
    return 0.5 * sum(jnp.sum((p - batch[k][0]) ** 2) for k, p in params.items())

shapes = {"t": (3, 4), "s": (5,), "r": (6,)}
rows = slice(process * n // processes, (process + 1) * n // processes)

def from_here(x):
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x[rows], x.shape)

def trajectory(rule):
    tx = ef.data_parallel(optax.chain(rule, optax.sgd(0.125, momentum=0.5)), mesh, "data")

    @jax.jit
    def step(params, state, batch):
        points = ef.query_points(state, params)
        losses, grads = ef.worker_value_and_grad(loss, mesh, "data")(points, batch)
        updates, state = tx.update(grads["params"], state, params, grads=grads)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params = jax.device_put(start, NamedSharding(mesh, P()))
    state = tx.init(params)
    for _ in range(steps):
        whole = {k: rng.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()}
        batch = {k: from_here(x) for k, x in whole.items()}
        params, state = jax.block_until_ready(step(params, state, batch))
    return params, state

def seen(x):
    if x.is_fully_replicated:
        return "all", np.asarray(x.addressable_data(0))
    own = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return "own", np.concatenate([np.asarray(shard.data) for shard in own])

found = {}
for name, rule in rules.items():
    for path, x in jax.tree_util.tree_leaves_with_path(trajectory(rule)):
        kind, value = seen(x)
        found[f"{name}{jax.tree_util.keystr(path)}:{kind}"] = value
np.savez(out, **found)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", flags)
    return {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }


def run(processes: int, devices: int, folder: Path) -> list[dict[str, np.ndarray]]:
    """What every process has at the end, in their order; no process survives a failure."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    port, outputs, children = free_port(), [], []
    try:
        for i in range(processes):
            outputs.append(folder / f"{processes}x{devices}_{i}.npz")
            arguments = [str(a) for a in (program, i, processes, port, outputs[-1], STEPS)]
            log = (folder / f"{processes}x{devices}_{i}.log").open("w")
            children.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment(devices),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
            log.close()
        for i, child in enumerate(children):
            code = child.wait(TIMEOUT)
            text = (folder / f"{processes}x{devices}_{i}.log").read_text()
            assert code == 0, f"process {i} of {processes} ended with {code}:\n{text[-3000:]}"
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [dict(np.load(path)) for path in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_are_one(devices, tmp_path):
    (single,) = run(1, 2 * devices, tmp_path)
    pair = run(2, devices, tmp_path)
    assert all(one.keys() == single.keys() for one in pair)
    rules = {name.partition("[")[0] for name in single}
    memories = {n.partition("[")[0] for n, x in single.items() if n.endswith(":own") and x.any()}
    assert len(rules) == 6 and memories == rules - {"marina"}  # whose memory is equal on all
    for name, want in single.items():
        tolerance = 1e-4 if name.startswith(SUMMED) and devices > 1 else 0
        parts = [one[name] for one in pair]
        for got in [np.concatenate(parts)] if name.endswith(":own") else parts:
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)
