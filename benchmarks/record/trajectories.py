"""Part *trajectories*: checksums of every rule in every mode.

The rules are those that the tests run over (``EVERY``), in the usual modes; and every compressor
that a rule takes (``COMPRESSED``), once sparse and once unbiased, in one mode of each kind. With
``--thorough`` all of them run in all modes. Several rules share a program, each on parameters of
its own; what one of them fails at is found by running it alone. Most of the time goes into tracing.

The programs are compiled in haste (``HASTE``): what their bits are compared with was, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

import ef_optax as ef
from benchmarks.record import modes
from tests.feedback import rules

TOGETHER = 16
"""Rules in one program."""

HASTE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")

CODECS: dict[str, dict[str, Callable[[], ef.Compressor]]] = {
    "sparse": {"top_k": lambda: ef.top_k(0.3)},
    "unbiased": {
        "random_k": lambda: ef.random_k(0.6, 7, scaled=True),
        "natural": lambda: ef.natural(8),
    },
}
"""Of each kind the first is taken that a rule accepts."""

Make = Callable[[], optax.GradientTransformation]


def record(thorough: bool) -> dict[str, Any]:
    """Runs all rules; in this process, whose flags are ``HASTE``."""
    makers, refused = made()
    found: dict[str, Any] = {"refused": refused, "rules": {name: {} for name in makers}}
    usual = list(rules.EVERY)
    compressed = [name for name in makers if name not in rules.EVERY]
    every = tuple(modes.MODES)
    groups = [(usual, every if thorough else modes.USUAL)]
    groups += [(compressed, every if thorough else modes.FEW)]
    seconds = {mode: {"wall_seconds": 0.0, "cpu_seconds": 0.0} for mode in modes.MODES}
    with mock.patch.dict(rules.EVERY, makers), jax.numpy_dtype_promotion("strict"):
        for names, mode in work(groups):
            wall, cpu = time.perf_counter(), time.process_time()
            for name, result in run(mode, names).items():
                found["rules"][name][mode] = result
            seconds[mode]["wall_seconds"] += time.perf_counter() - wall
            seconds[mode]["cpu_seconds"] += time.process_time() - cpu
            total = sum(taken["cpu_seconds"] for taken in seconds.values())
            print(f"trajectories, {names[0]} to {names[-1]}, {mode}: {total:.0f} s", flush=True)
    return found | {"seconds": seconds}


def work(groups: list[tuple[list[str], tuple[str, ...]]]) -> Iterator[tuple[list[str], str]]:
    """The rules of each program, and the mode; caches are cleared between the rules."""
    for names, chosen in groups:
        for i in range(0, len(names), TOGETHER):
            for mode in chosen:
                yield names[i : i + TOGETHER], mode
            jax.clear_caches()


def made() -> tuple[dict[str, Make], dict[str, str]]:
    """Makers of all transformations by name, and why a compressor was refused."""
    makers, refused = dict(rules.EVERY), {}
    for (rule, argument), make in rules.COMPRESSED.items():
        for kind, codecs in CODECS.items():
            for name, codec in codecs.items():
                error = error_of(lambda make=make, codec=codec: make(codec()))
                if error is None:
                    label = f"{rule} {argument} ~ {kind} {name}"
                    makers[label] = lambda make=make, codec=codec: make(codec())
                    break
                refused[f"{rule} {argument} ~ {kind} {name}"] = error
    return makers, refused


def error_of(make: Make) -> str | None:
    """The kind of error that a rule refuses its arguments with, at once or when it starts."""
    params = {"x": modes.parameters()}
    try:
        tx = make()
        start = jax.vmap(lambda _: tx.init(params), axis_name=rules.AXIS, axis_size=rules.N)
        jax.eval_shape(start, np.zeros(rules.N))
    except Exception as error:
        return type(error).__name__
    return None


def run(mode: str, names: list[str]) -> dict[str, Any]:
    """What each rule did, or how it failed."""
    try:
        trajectory = modes.MODES[mode](names)
    except Exception as error:
        if len(names) == 1:
            return {names[0]: {"error": f"{type(error).__name__}: {error}".split("\n")[0]}}
        return {name: result for one in names for name, result in run(mode, [one]).items()}
    return {name: summary(name, trajectory) for name in names}


def summary(name: str, trajectory: modes.Trajectory) -> dict[str, Any]:
    """The checksum of all updates and parameters, and the parameters at the end."""
    checksum = hashlib.sha256()
    for trees in trajectory:
        for leaf in jax.tree.leaves([tree[name] for tree in trees]):
            checksum.update(f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).data)
    last = jax.tree.leaves(trajectory[-1][1][name])
    final = np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in last])
    wide = final.astype(np.float64)
    return {
        "sha256": checksum.hexdigest(),
        "sum": float(wide.sum()),
        "norm": float(np.linalg.norm(wide)),
        "final": base64.b64encode(final.tobytes()).decode(),
    }


def values(result: dict[str, Any]) -> np.ndarray:
    """The parameters at the end, as they were written."""
    return np.frombuffer(base64.b64decode(result["final"]), np.float32)


def in_haste(thorough: bool) -> dict[str, Any]:
    """The record, made by a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": " ".join([os.environ["XLA_FLAGS"], *HASTE])}
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "trajectories.json"
        command = [sys.executable, "-m", "benchmarks.record.trajectories", str(path)]
        command += ["--thorough"] if thorough else []
        subprocess.run(command, env=environment, check=True)
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(json.dumps(record("--thorough" in sys.argv)))
