"""Real processes over localhost follow the trajectory of one process to the last bit."""

from __future__ import annotations

import json
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

RULES = ("error_feedback", "power_sgd", "ef21", "marina", "dgc", "two_shot")
OTHERS = ("delayed", "on_host", "controller", "loco", "gossip", "demo", "joined", "overlapped")

# Run with: process id, number of processes, port, output files, steps, rules. Each process holds
# only its own share of the batch, and writes what it can see of the result: the parameters and the
# whole state of every rule; of an array that differs between workers, the rows of its own workers.
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
eighth = ef.block_quantize(8, block=4)
levels = ef.policies.hold_bytes([ef.top_k(0.1), ef.top_k(0.5)], 40)
rules = {
    "error_feedback": optax.chain(optax.trace(0.5), ef.error_feedback(policy, axis_name="data")),
    "power_sgd": ef.error_feedback(low_rank, axis_name="data"),
    "ef21": ef.ef21(ef.top_k(0.3), axis_name="data"),
    "marina": ef.marina(unbiased, 0.3, key=3, axis_name="data"),
    "dgc": ef.dgc(ef.top_k(0.3), clip_norm=3.0, axis_name="data"),
    "two_shot": ef.error_feedback(shot, axis_name="data"),
    "delayed": ef.error_feedback(ef.exchanges.delayed(ef.top_k(0.3)), axis_name="data"),
    "on_host": ef.error_feedback(policy, axis_name="data", memory=ef.on_host(eighth)),
    "controller": ef.error_feedback(levels, axis_name="data"),
    "joined": ef.error_feedback(ef.qsgd(3, bucket=4, key=4), axis_name="data"),
    "overlapped": ef.error_feedback(policy, axis_name="data"),
}
sgd = optax.sgd(0.125, momentum=0.5)
rules = {name: optax.chain(rule, sgd) for name, rule in rules.items()} | {
    "loco": ef.recipes.loco(sgd, reset_every=4, weights=eighth, axis_name="data"),
    "gossip": ef.local.choco_sgd(sgd, ef.top_k(0.3), 0.3, mean_every=4, axis_name="data"),
    "demo": ef.recipes.demo(0.01, axis_name="data"),
}

def loss(params, batch):
    return 0.5 * sum(jnp.sum((p - batch[k][0]) ** 2) for k, p in params.items())

SHORT = {"t": (3, 4), "s": (5,), "r": (6,)}
LONG = {"t": (2, 128), "s": (128,), "r": (6,)}  # of which the first two are joined
rows = slice(process * n // processes, (process + 1) * n // processes)

def from_here(x):
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x[rows], x.shape)

value_and_grad = ef.worker_value_and_grad(loss, mesh, "data")

def in_one_program(tx, params, batches):
    @jax.jit
    def step(params, state, batch):
        losses, grads = value_and_grad(ef.query_points(state, params), batch)
        updates, state = tx.update(grads["params"], state, params, grads=grads)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        params, state = jax.block_until_ready(step(params, state, batch))
    return params, state

def overlapped(tx, params, batches):
    gradient, apply = jax.jit(value_and_grad), jax.jit(optax.apply_updates)
    start = jax.tree.map(jnp.zeros_like, params)
    late = ef.parallel.Overlapped(jax.jit(tx.update), tx.init(params), start)
    for batch in batches:
        params = apply(params, late(gradient(params, batch)[1], params))
    return params, late.finish()

def trajectory(name):
    tx = ef.data_parallel(rules[name], mesh, "data")
    shapes = LONG if name == "joined" else SHORT
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params = jax.device_put(start, NamedSharding(mesh, P()))
    wholes = [{k: rng.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()}
              for _ in range(steps)]
    batches = [{k: from_here(x) for k, x in whole.items()} for whole in wholes]
    run = overlapped if name == "overlapped" else in_one_program
    return run(tx, params, batches)

def seen(x):
    if x.is_fully_replicated:
        return "all", np.asarray(x.addressable_data(0))
    own = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return "own", np.concatenate([np.asarray(shard.data) for shard in own])

found = {}
for name in sys.argv[6:]:
    for path, x in jax.tree_util.tree_leaves_with_path(trajectory(name)):
        kind, value = seen(x)
        found[f"{name}{jax.tree_util.keystr(path)}:{kind}"] = value
np.savez(f"{out}_{process}.npz", **found)
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


def launch(program: str, processes: int, devices: int, folder: Path, *arguments: str) -> None:
    """Runs a program in processes of some devices each; none of them survives a failure."""
    path = folder / "program.py"
    path.write_text(program)
    port, children = free_port(), []
    logs = [folder / f"{processes}x{devices}_{i}.log" for i in range(processes)]
    try:
        for i, log in enumerate(logs):
            ids = [str(a) for a in (i, processes, port)]
            with log.open("w") as file:
                children.append(
                    subprocess.Popen(
                        [sys.executable, path, *ids, *arguments],
                        env=environment(devices),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        for i, child in enumerate(children):
            code = child.wait(TIMEOUT)
            text = logs[i].read_text()
            assert code == 0, f"process {i} of {processes} ended with {code}:\n{text[-3000:]}"
    finally:
        for child in children:
            child.kill()
            child.wait()


def run(
    rules: tuple[str, ...], processes: int, devices: int, folder: Path
) -> list[dict[str, np.ndarray]]:
    """What every process has at the end, in their order."""
    out = folder / f"{processes}x{devices}"
    launch(PROGRAM, processes, devices, folder, str(out), str(STEPS), *rules)
    return [dict(np.load(f"{out}_{i}.npz")) for i in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "devices"),
    [(RULES, 1), (RULES, 2), (OTHERS, 1)],
    ids=["rules, two workers", "rules, four workers", "others, two workers"],
)
def test_two_processes_are_one(rules, devices, tmp_path):
    (single,) = run(rules, 1, 2 * devices, tmp_path)
    pair = run(rules, 2, devices, tmp_path)
    assert all(one.keys() == single.keys() for one in pair)
    memories = {n.partition("[")[0] for n, x in single.items() if n.endswith(":own") and x.any()}
    assert memories == set(rules) - {"marina"}  # whose memory is equal on all
    for name, want in single.items():
        tolerance = 1e-4 if name.startswith(SUMMED) and devices > 1 else 0
        parts = [one[name] for one in pair]
        for got in [np.concatenate(parts)] if name.endswith(":own") else parts:
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)


# Run with: process id, number of processes, port, folder, and the numbers of workers, of which each
# takes three steps from where the one before it stopped. The last worker's second gradient is NaN.
CHANGED = """
import sys
import jax
import numpy as np

process, processes, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process, initialization_timeout=60)

import optax
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
import ef_optax as ef

def loss(params, batch):
    return 0.5 * ((params["w"] - batch[0]) ** 2).sum()

for n in map(int, sys.argv[5:]):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((n,), ("data",), auto, devices=jax.devices()[:n])
    rows = slice(process * n // processes, (process + 1) * n // processes)
    feedback = ef.error_feedback(ef.top_k(0.3), axis_name="data")
    tx = ef.data_parallel(optax.chain(feedback, optax.sgd(0.125, momentum=0.5)), mesh, "data")

    @jax.jit
    def step(params, state, batch):
        _, grads = ef.worker_value_and_grad(loss, mesh, "data")(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = {"w": np.random.default_rng(0).normal(size=12).astype(np.float32)}
    params = jax.device_put(start, NamedSharding(mesh, P()))
    last = max((int(path.name) for path in Path(folder).glob("[0-9]")), default=0)
    if last:
        back = ef.restore(f"{folder}/{last}", tx, params=params)
        params, state = back.params, back.opt_state
    else:
        state = tx.init(params)
    for t in range(3):
        whole = np.random.default_rng([last, t]).normal(size=(n, 12)).astype(np.float32)
        if t == 1:
            whole[-1] = np.nan
        batch = jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("data")), whole[rows], whole.shape
        )
        before = np.asarray(params["w"].addressable_data(0))
        params, state = jax.block_until_ready(step(params, state, batch))
        same = np.array_equal(params["w"].addressable_data(0), before)
        assert same == (t == 1), f"{n} workers, step {t}"
    assert not ef.parallel.differing_replicas(params)
    ef.save(f"{folder}/{last + 1}", tx, params=params, opt_state=state)
"""


@pytest.mark.slow
def test_four_processes_become_two_and_two_of_four_devices(tmp_path):
    """Checkpoints of 4, 2 and 8 workers, with a NaN on one of them, are those of one process."""
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    launch(CHANGED, 1, 8, tmp_path, str(one), "4", "2", "8")
    for processes, devices in ((4, 1), (2, 1), (2, 4)):
        launch(CHANGED, processes, devices, tmp_path, str(several), str(processes * devices))
    for number in ("1", "2", "3"):
        about = [json.loads((at / number / "about/metadata").read_text()) for at in (one, several)]
        assert about[0] == about[1]  # with the checksums of the parts of all arrays
