"""What a user waits for before the first step: init, trace, lower and compile, beside dense Adam.

A method is ``optax.chain(ef.error_feedback(C, axis_name="d"), optax.adam(1e-3))`` for eight
workers: by ``ef.data_parallel`` on the mesh that ``jax.make_mesh((8,), ("d",))`` makes, whose axis
is Explicit, or on one with an Auto axis, of virtual devices; in two processes with four such
devices each, which Gloo connects; or by ``ef.simulate(tx, 8, "d")``.
*dense* is the same Adam after ``lax.pmean`` in a ``shard_map``, and beside ``simulate`` Adam on the
mean of the gradients. *init* is ``tx.init`` with all that it compiles and runs; *trace*, *lower*
and *compile* are the stages of ``jax.jit(tx.update)``; the step is not run. Every cell is measured
by a process of its own, without any cache, after one small program has started the backend.

    python -m benchmarks.first_step [--trees gpt resnet50] [--methods identity scaled_sign]
                                    [--modes explicit auto processes simulate] [--repeats 1]
                                    [--out DIR] [--merge]

prints seconds by the clock and, in brackets, of the processor (all threads), with their ratio to
dense, which is always measured, and the lines of the lowered program; and writes
``first_step.json``. Names may be joined by commas. Of several repeats the one that took the
processor least is kept. Of two processes the first is measured, while the other does the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks import compile_time, timing

WORKERS, AXIS = 8, "d"
PROCESSES = {"processes": 2}  # one, unless a mode says otherwise
DENSE = "dense"
PARTS = ("init", "trace", "lower", "compile")
Shapes = dict[str, tuple[int, ...]]
Cell = dict[str, Any]

METHODS: dict[str, Callable[[], ef.Compressor] | None] = {
    DENSE: None,
    "identity": ef.identity,
    "scaled_sign": ef.scaled_sign,
    "top_k": lambda: ef.top_k(0.01),
    "block_top_k": lambda: ef.block_top_k(0.01),
    "qsgd": lambda: ef.qsgd(7, key=0, bucket=128),
    "power_sgd": lambda: ef.power_sgd(4),
}


########################################################################################
# Trees
########################################################################################


def gpt(width: int = 256, layers: int = 12, vocabulary: int = 8192, context: int = 1024) -> Shapes:
    """A GPT with query, key and value in one matrix and a tied head: 148 leaves of 8 shapes."""
    shapes: Shapes = {"tokens": (vocabulary, width), "positions": (context, width)}
    for i in range(layers):
        kernels = {"qkv": (width, 3 * width), "out": (width, width)}
        kernels |= {"up": (width, 4 * width), "down": (4 * width, width)}
        for name, kernel in kernels.items():
            shapes |= {f"{i}/{name}/kernel": kernel, f"{i}/{name}/bias": kernel[1:]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{i}/{norm}/scale": (width,), f"{i}/{norm}/bias": (width,)}
    return shapes | {"norm/scale": (width,), "norm/bias": (width,)}


def matrices() -> Shapes:
    """A hundred matrices that are all of different shape."""
    return {f"{i}": (64, 32 + i) for i in range(100)}


def many() -> Shapes:
    """Five hundred leaves: ten of each of fifty shapes."""
    return {f"{i}/{j}": (16 + i, 32) for i in range(50) for j in range(10)}


def toy() -> Shapes:
    """A perceptron for digits with a scalar: five leaves."""
    hidden = {"in/kernel": (784, 128), "in/bias": (128,)}
    return hidden | {"out/kernel": (128, 10), "out/bias": (10,), "temperature": ()}


TREES: dict[str, Callable[[], Shapes]] = {
    "gpt": gpt,
    "resnet50": compile_time.resnet50,
    "matrices": matrices,
    "many": many,
    "toy": toy,
}


########################################################################################
# One cell
########################################################################################


@contextlib.contextmanager
def nowhere() -> Iterator[None]:
    """Simulated workers need no devices."""
    yield


def dense(mean: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Adam on the mean of the workers' gradients."""
    adam = optax.adam(1e-3)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return adam.update(jax.tree.map(mean, grads), state, params)

    return optax.GradientTransformation(adam.init, update)


def simulated(method: str) -> tuple[optax.GradientTransformation, Any, Any, Any]:
    """The transformation of eight simulated workers, the context, and where things are placed."""
    make = METHODS[method]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if make is None:
        return dense(lambda g: jnp.mean(g, axis=0)), nowhere(), one, one
    return ef.simulate(chain(make), WORKERS, AXIS), nowhere(), one, one


def on_mesh(method: str, kind: AxisType) -> tuple[optax.GradientTransformation, Any, Any, Any]:
    """The same on a mesh of eight devices."""
    mesh = jax.make_mesh((WORKERS,), (AXIS,), axis_types=(kind,))
    make = METHODS[method]
    if make is None:
        inner = dense(lambda g: jax.lax.pmean(g[0], AXIS))
        specs = {"in_specs": (P(AXIS), P(), P()), "out_specs": P()}
        mapped = jax.shard_map(inner.update, mesh=mesh, **specs)
        tx = optax.GradientTransformation(inner.init, mapped)
    else:
        tx = ef.data_parallel(chain(make), mesh, AXIS)
    return tx, jax.set_mesh(mesh), NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))


def chain(make: Callable[[], ef.Compressor]) -> optax.GradientTransformation:
    """One worker's transformation."""
    return optax.chain(ef.error_feedback(make(), axis_name=AXIS), optax.adam(1e-3))


MODES: dict[str, Callable[[str], tuple[optax.GradientTransformation, Any, Any, Any]]] = {
    "explicit": lambda method: on_mesh(method, AxisType.Explicit),
    "auto": lambda method: on_mesh(method, AxisType.Auto),
    "processes": lambda method: on_mesh(method, AxisType.Explicit),
    "simulate": simulated,
}


class Stopwatch:
    """Seconds of each part, by the clock and of the processor."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is done inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu


def measure_here(tree: str, method: str, mode: str) -> Cell:
    """Measures one cell in this process, which must be fresh."""
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    shapes = TREES[tree]()
    tx, context, whole, by_worker = MODES[mode](method)
    grads = {
        name: jax.ShapeDtypeStruct((WORKERS, *shape), jnp.float32, sharding=by_worker)
        for name, shape in shapes.items()
    }
    watch = Stopwatch()
    with context:
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        params = jax.block_until_ready(jax.device_put(zeros, whole))
        with watch.part("init"):
            state = jax.block_until_ready(tx.init(params))
        with watch.part("trace"):
            traced = jax.jit(tx.update).trace(grads, state, params)
        with watch.part("lower"):
            lowered = traced.lower()
        with watch.part("compile"):
            lowered.compile()
    sums = {"total": sum(watch.wall.values()), "cpu_total": sum(watch.cpu.values())}
    cpu = {f"cpu_{name}": seconds for name, seconds in watch.cpu.items()}
    return {**watch.wall, **cpu, **sums, "lines": lowered.as_text().count("\n")}


def measure(tree: str, method: str, mode: str, repeats: int = 1) -> Cell:
    """Measures one cell in fresh processes; the one that took the processor least."""
    cells = [measured_once(tree, method, mode) for _ in range(repeats)]
    return min(cells, key=lambda cell: cell["cpu_total"])


def measured_once(tree: str, method: str, mode: str) -> Cell:
    """What the first of a cell's processes prints."""
    count, port = PROCESSES.get(mode, 1), free_port()
    command = [sys.executable, "-m", "benchmarks.first_step", "--cell", tree, method, mode]
    with contextlib.ExitStack() as stack:
        children = []
        for number in range(count):
            own = [*command, "--process", str(number), str(port)]
            options: dict[str, Any] = {"env": environment(count), "stdout": subprocess.PIPE}
            children.append(stack.enter_context(subprocess.Popen(own, **options)))
            stack.callback(children[-1].kill)  # of a process whose peer has failed
        outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{tree}, {method}, {mode}: a process failed; its message is above.")
    return json.loads(outputs[0].splitlines()[-1])


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def join(mode: str, number: int, port: int) -> None:
    """Connects this process with the others of its cell."""
    if (count := PROCESSES.get(mode, 1)) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, number)


def environment(processes: int = 1) -> dict[str, str]:
    """The variables of a process with its share of eight devices, and no cache of programs."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    devices = f"--xla_force_host_platform_device_count={WORKERS // processes}"
    own = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(2 * WORKERS)}
    own |= {"XLA_FLAGS": " ".join([*kept, devices]), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {**os.environ, **own}


########################################################################################
# The table
########################################################################################


def run(
    trees: Sequence[str], methods: Sequence[str], modes: Sequence[str], repeats: int
) -> dict[str, Cell]:
    """Measures everything, printing each row as soon as it is known; cells by their names."""
    results: dict[str, Cell] = {}
    for tree in trees:
        for mode in modes:
            print(f"\n{heading(tree, mode)}\n", flush=True)
            for method in [DENSE, *(method for method in methods if method != DENSE)]:
                results[f"{tree}/{mode}/{method}"] = cell = measure(tree, method, mode, repeats)
                print(row(method, cell, results[f"{tree}/{mode}/{DENSE}"]), flush=True)
    return results


def heading(tree: str, mode: str) -> str:
    """What stands above the rows of one tree in one mode."""
    shapes = TREES[tree]()
    values = sum(math.prod(shape) for shape in shapes.values())
    counts = f"{len(shapes)} leaves, {len(set(shapes.values()))} shapes, {values / 1e6:.1f}M values"
    columns = ["method", *PARTS, "total", "x dense", "lines"]
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    text = f"{tree} ({counts}), {mode}, {WORKERS} workers; seconds (of the processor)"
    return f"{text}\n\n| {' | '.join(columns)} |\n|{'|'.join(rule)}|"


def row(method: str, cell: Cell, peer: Cell) -> str:
    """One line of the table; the ratios are those of the totals."""
    seconds = [f"{cell[part]:.2f} ({cell[f'cpu_{part}']:.2f})" for part in (*PARTS, "total")]
    ratio = f"{cell['total'] / peer['total']:.1f} ({cell['cpu_total'] / peer['cpu_total']:.1f})"
    return f"| {' | '.join([method, *seconds, ratio, str(cell['lines'])])} |"


def names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    """Reads names that are joined by commas."""

    def read(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {list(known)}")
        return text.split(",")

    return read


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, known in (("trees", TREES), ("methods", METHODS), ("modes", MODES)):
        kinds = {"type": names(known), "nargs": "+", "default": [list(known)]}
        parser.add_argument(f"--{flag}", help=", ".join(known), **kinds)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each cell")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    parser.add_argument("--merge", action="store_true", help="keep the cells that --out has")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--process", nargs=2, type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.cell:
        number, port = flags.process
        join(flags.cell[2], number, port)
        print(json.dumps(measure_here(*flags.cell)))
        return
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    chosen = [sum(given, []) for given in (flags.trees, flags.methods, flags.modes)]
    results = run(*chosen, flags.repeats)
    path = flags.out / "first_step.json"
    if flags.merge and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))["results"] | results
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
