"""How long an error-feedback step takes to compile for a model of many leaves, against Adam.

Three trees: a transformer (200 leaves, 11 shapes), ResNet-50 (161 leaves, 28 shapes) and 200 leaves
of different shapes. The step of one worker is ``error_feedback(codec).update``, leaf by
leaf or (*flat*) inside ``ef.flatten``, which makes one vector of all leaves. Adam's step is
``optax.adam(...).update``, on the same tree with the state donated. For several workers the step is
``data_parallel`` over virtual devices, against Adam after a mean over the devices. Nothing is run.
One process traces, lowers and compiles a program after a warm-up, without any cache.

    python -m benchmarks.compile_time [--trees ...] [--steps ...] [--workers 1 4] [--out DIR]

prints a table and writes ``compile_time.json``. It counts kernels (the fusions in the program) and
different kernels: the backend compiles equal ones once.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks import timing

Shapes = dict[str, tuple[int, ...]]
PEER = "adam"
Make = Callable[..., optax.GradientTransformation]  # takes the axis name


def leafwise(compressor: Callable[[], Any]) -> Make:
    """Error feedback leaf by leaf."""
    return lambda axis_name=None: ef.error_feedback(compressor(), axis_name=axis_name)


def flat(compressor: Callable[[], Any], flatten: Callable[..., Any] = ef.flatten) -> Make:
    """Error feedback of all leaves as one vector."""
    return lambda axis_name=None: flatten(leafwise(compressor)(axis_name))


STEPS: dict[str, Make] = {
    "identity": leafwise(ef.identity),
    "scaled_sign": leafwise(ef.scaled_sign),
    "top_k(0.01)": leafwise(lambda: ef.top_k(0.01)),
    "global_top_k(0.01)": leafwise(lambda: ef.global_top_k(0.01)),
    "flat identity": flat(ef.identity),
    "flat scaled_sign": flat(ef.scaled_sign),
    "flat top_k(0.01)": flat(lambda: ef.top_k(0.01)),
    "optax.flatten scaled_sign": flat(ef.scaled_sign, optax.flatten),
}


def transformer(width: int = 768, layers: int = 12, vocabulary: int = 50257) -> Shapes:
    """GPT-2 small with separate query, key and value, and heads for two small tasks: 200 leaves."""
    shapes: Shapes = {}
    for i in range(layers):
        for name in ("query", "key", "value", "out"):
            shapes[f"{i}/{name}/kernel"] = (width, width)
            shapes[f"{i}/{name}/bias"] = (width,)
        shapes |= {f"{i}/up/kernel": (width, 4 * width), f"{i}/up/bias": (4 * width,)}
        shapes |= {f"{i}/down/kernel": (4 * width, width), f"{i}/down/bias": (width,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{i}/{norm}/scale": (width,), f"{i}/{norm}/bias": (width,)}
    shapes |= {"tokens": (vocabulary, width), "positions": (1024, width)}
    shapes |= {"norm/scale": (width,), "norm/bias": (width,)}
    shapes |= {"head/kernel": (width, vocabulary), "head/bias": (vocabulary,)}
    return shapes | {"task1/kernel": (width, 3), "task2/kernel": (width, 5)}


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet: 161 leaves."""
    shapes: Shapes = {"stem/kernel": (7, 7, 3, 64), "stem/scale": (64,), "stem/bias": (64,)}
    before = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            convolutions = [
                (1, 1, before, width),
                (3, 3, width, width),
                (1, 1, width, 4 * width),
            ]
            if block == 0:
                convolutions.append((1, 1, before, 4 * width))
            for i, kernel in enumerate(convolutions):
                name = f"{stage}/{block}/{i}"
                shapes[f"{name}/kernel"] = kernel
                shapes |= {f"{name}/scale": kernel[-1:], f"{name}/bias": kernel[-1:]}
            before = 4 * width
    return shapes | {"head/kernel": (2048, 1000), "head/bias": (1000,)}


def distinct(count: int = 200, least: int = 30, most: int = 300_000) -> Shapes:
    """Vectors of different lengths, evenly spaced on a logarithmic scale."""
    lengths = [int(least * (most / least) ** (i / (count - 1))) + i for i in range(count)]
    return {f"{i}": (length,) for i, length in enumerate(lengths)}


TREES: dict[str, Callable[[], Shapes]] = {
    "transformer": transformer,
    "resnet50": resnet50,
    "distinct": distinct,
}


def step_of(name: str, shapes: Shapes, workers: int) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The step, and the abstract gradients and state for which it is compiled."""
    like = jax.ShapeDtypeStruct
    params = {k: like(s, jnp.float32) for k, s in shapes.items()}
    grads = (
        params if workers == 1 else {k: like((workers, *s), jnp.float32) for k, s in shapes.items()}
    )
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((workers,), ("data",), kinds, devices=jax.devices()[:workers])
    if name == PEER:
        tx = optax.adam(1e-3)

        def local(g: Any, state: Any) -> Any:
            mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), g)
            return tx.update(mean, state)

        update: Callable[..., Any] = tx.update
        if workers > 1:
            update = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
        return update, (grads, jax.eval_shape(tx.init, params))
    if workers == 1:
        tx = STEPS[name]()
        return tx.update, (grads, jax.eval_shape(tx.init, params))
    tx = ef.data_parallel(STEPS[name](axis_name="data"), mesh, "data")
    return lambda g, state: tx.update(g, state, params_of(params)), (
        grads,
        tx.abstract_state(params),
    )


def params_of(like: Any) -> Any:
    """Parameters for a rule that does not read them."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def measure(name: str, shapes: Shapes, workers: int) -> dict[str, Any]:
    """Seconds to trace and lower, and to compile; kernels in the program, and different ones."""
    step, arguments = step_of(name, shapes, workers)
    start, start_cpu = time.perf_counter(), time.process_time()
    lowered = jax.jit(lambda g, state: step(g, state)[::-1], donate_argnums=1).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end, end_cpu = time.perf_counter(), time.process_time()
    kernels = kernels_of(compiled.as_text() or "")
    return {
        "trace_seconds": middle - start,
        "compile_seconds": end - middle,
        "cpu_seconds": end_cpu - start_cpu,
        "kernels": sum(kernels.values()),
        "different_kernels": len(kernels),
    }


def kernels_of(text: str) -> collections.Counter[str]:
    """The fused computations that a compiled program calls, without names, and how often."""
    bodies: dict[str, str] = {}
    for block in re.split(r"\n(?=[%E])", text):
        head = re.match(r"%?([\w.\-]+) ", block)
        if head and not block.startswith("ENTRY"):
            names: dict[str, int] = {}
            body = re.sub(r", metadata=\{[^}]*\}", "", block[block.index("\n") :])
            body = re.sub(
                r"%[\w.\-]+", lambda m, names=names: str(names.setdefault(m[0], len(names))), body
            )
            bodies[head[1]] = body
    calls = re.findall(r" fusion\(.*?calls=%([\w.\-]+)", text)
    return collections.Counter(bodies[name] for name in calls)


def run(trees: Sequence[str], steps: Sequence[str], workers: Sequence[int]) -> list[dict[str, Any]]:
    """Measures everything, printing a line as soon as it is known."""
    jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()  # the first compilation starts threads
    rows = []
    for tree in trees:
        shapes = TREES[tree]()
        print(f"\n{tree}: {len(shapes)} leaves, {len(set(shapes.values()))} shapes", flush=True)
        print(
            f"{'workers':>7} {'step':18} {'trace s':>8} {'compile s':>9} {'total s':>8} "
            f"{'CPU s':>7} {'x adam':>7} {'kernels':>8} {'different':>9}"
        )
        for n in workers:
            peer = 0.0
            for name in (PEER, *steps):
                row = {"tree": tree, "workers": n, "step": name, **measure(name, shapes, n)}
                total = row["trace_seconds"] + row["compile_seconds"]
                peer = total if name == PEER else peer
                row["times_adam"] = total / peer
                rows.append(row)
                print(
                    f"{n:7} {name:18} {row['trace_seconds']:8.2f} {row['compile_seconds']:9.2f} "
                    f"{total:8.2f} {row['cpu_seconds']:7.2f} {row['times_adam']:7.2f} "
                    f"{row['kernels']:8} {row['different_kernels']:9}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    count = max(flags.workers)
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={count}"
    jax.config.update("jax_enable_compilation_cache", False)
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    rows = run(flags.trees, flags.steps, flags.workers)
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "results": rows}
    path = flags.out / "compile_time.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
