"""Several processes follow one process's trajectory to the last bit: real ones, over localhost."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STEPS, TIMEOUT = 10, 180

# Run with: process id, number of processes, port, output file. Each process holds its own share of
# the batch only, and writes what it can see of the result.
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

n = jax.device_count()
mesh = jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
codecs = {"t": ef.top_k(0.3), "s": ef.scaled_sign(), "r": ef.random_k(0.3, key=1)}
policy = ef.per_leaf(lambda path, like: codecs[path])
chain = optax.chain(
    optax.trace(0.5), ef.error_feedback(policy, axis_name="data"), optax.sgd(0.125, momentum=0.5)
)
tx = ef.data_parallel(chain, mesh, "data")

def loss(params, batch):
    return 0.5 * sum(jnp.sum((p - batch[k][0]) ** 2) for k, p in params.items())

@jax.jit
def step(params, state, batch):
    losses, grads = ef.worker_value_and_grad(loss, mesh, "data")(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

shapes = {"t": (3, 4), "s": (5,), "r": (6,)}
rng = np.random.default_rng(0)
start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
params = jax.device_put(start, NamedSharding(mesh, P()))
state = tx.init(params)
rows = slice(process * n // processes, (process + 1) * n // processes)
for t in range(int(sys.argv[5])):
    whole = {k: rng.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()}
    batch = {
        k: jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x[rows], x.shape)
        for k, x in whole.items()
    }
    params, state = jax.block_until_ready(step(params, state, batch))

found = {f"p_{k}": np.asarray(x.addressable_data(0)) for k, x in params.items()}
for k, x in state[1].residual.items():
    own = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    found[f"e_{k}"] = np.concatenate([np.asarray(shard.data) for shard in own])
np.savez(out, count=np.asarray(state[1].exchange.count.addressable_data(0)), **found)
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
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
    }


def run(processes: int, devices: int, folder: Path) -> list[dict[str, np.ndarray]]:
    """What every process has at the end, in their order; none is left behind on failure."""
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
    assert single["count"] == STEPS
    assert any(np.count_nonzero(single[f"e_{k}"]) for k in "tsr")
    for name, want in single.items():
        if name.startswith("e_"):
            got = np.concatenate([one[name] for one in pair])
            np.testing.assert_array_equal(got, want, err_msg=name)
        else:
            for one in pair:
                np.testing.assert_array_equal(one[name], want, err_msg=name)
