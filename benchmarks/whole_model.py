"""One budget for a whole model: the time and memory of choosing among all leaves.

The benchmark times the update of error feedback with top-1% on one worker: emitted updates, and new
residuals written over the old ones. Trees: ResNet-18 (11 million values in 62 leaves) and a
transformer (25 million in 200 leaves). ``global_top_k`` is compared with the same choice inside
``optax.flatten``, top-k of each leaf by itself, and the floor ``e <- g + e``.

    python -m benchmarks.whole_model [--trees ...] [--rounds 9] [--out DIR]

Memory is what the compiled program needs beyond its arguments, in bytes for each value of the
model: *out*, results that are not written over an argument, and *temp*, buffers while it runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ef_optax as ef
from benchmarks import compile_time, timing
from experiments import models

Step = Callable[[Any, Any], tuple[Any, Any]]


def resnet18() -> Any:
    """Shapes of ResNet-18's parameters."""
    model = models.create("resnet18", classes=10)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), images)["params"]


def transformer() -> Any:
    """Shapes of a transformer with two embeddings, cut to 25 million parameters."""
    shapes = compile_time.transformer(width=384, layers=12, vocabulary=4800)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


TREES: dict[str, Callable[[], Any]] = {"resnet18": resnet18, "transformer": transformer}


def floor(g: Any, e: Any) -> tuple[Any, Any]:
    """No compression at all: the residual takes everything."""
    return jax.tree.map(jnp.add, g, e), ()


def rule(tx: optax.GradientTransformation, like: Any) -> tuple[Step, Any]:
    """The update and its first state; the state is the first argument, to be overwritten."""
    return lambda g, state: tx.update(g, state)[::-1], tx.init(zeros(like))


def zeros(like: Any) -> Any:
    """A tree of these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def steps(like: Any) -> dict[str, tuple[Step, Any]]:
    """Everything that is timed, by name, with its first state."""
    return {
        "floor": (floor, zeros(like)),
        "top_k, leaf by leaf": rule(ef.error_feedback(ef.top_k(0.01)), like),
        "global_top_k": rule(ef.error_feedback(ef.global_top_k(0.01)), like),
        "optax.flatten": rule(optax.flatten(ef.error_feedback(ef.top_k(0.01))), like),
    }


def contenders(like: Any) -> tuple[list[timing.Contender], dict[str, dict[str, float]]]:
    """The steps as contenders, and facts about their compiled programs."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    g, size = treedef.unflatten(drawn), sum(x.size for x in leaves)
    found, shown = [], {}
    for name, (step, state) in steps(like).items():
        lowered = jax.jit(step, donate_argnums=1).lower(g, state)
        start = time.perf_counter()
        program = lowered.compile()
        memory = program.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        shown[name] = {
            "compile_seconds": time.perf_counter() - start,
            "out": new / size,
            "temp": memory.temp_size_in_bytes / size,
        }
        held = {"state": jax.block_until_ready(program(g, state))[0]}

        def run(_: Any, program: Any = program, held: dict[str, Any] = held) -> Any:
            held["state"], out = jax.block_until_ready(program(g, held["state"]))
            return out

        found.append(timing.Contender(name, lambda: None, run))
    return found, shown


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each contender")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    record: dict[str, Any] = {"hardware": hardware, "jax": jax.__version__, "trees": {}}
    for tree in flags.trees:
        like = TREES[tree]()
        leaves = jax.tree.leaves(like)
        size = sum(x.size for x in leaves)
        print(f"\n{tree}: {size:,} values in {len(leaves)} leaves", flush=True)
        chosen, shown = contenders(like)
        taken = timing.measure(chosen, flags.rounds, flags.budget)
        print(timing.lines(taken))
        for name, one in shown.items():
            one |= {"seconds": list(taken[name].seconds)}
            print(
                f"{name:28} out {one['out']:5.2f}  temp {one['temp']:5.2f} B/value, "
                f"compiled in {one['compile_seconds']:.1f} s"
            )
        record["trees"][tree] = {"values": size, "leaves": len(leaves), "steps": shown}
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / "whole_model.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
