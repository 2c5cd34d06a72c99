"""The share of error feedback in the computation of a ResNet-18 training step, on one worker.

The benchmark times the forward and backward pass at a batch size, and the update of error feedback
alone on gradients of the same 11 million parameters; new residuals overwrite the old ones. Nothing
crosses a wire. The share is feedback / (feedback + passes). With --monitor each feedback is also
timed at every level of ``ef.monitor``; the overhead is what the level adds, over the unmonitored
step. Medians of interleaved runs in one process; beside them the medians of the processor time of
all threads, which changes less if the machine has other work.

    python -m benchmarks.share [--monitor] [--only scaled_sign] [--rounds 5] [--out DIR]

The forward and backward pass is compiled once. A level is another update, 15 s of compiling with
scaled_sign and about a minute with top_k on two cores, so ``--monitor --only scaled_sign`` takes
three minutes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ef_optax as ef
from benchmarks import timing
from experiments import models

TARGET = 0.05
COMPRESSORS = {"top_k(0.01)": lambda: ef.top_k(0.01), "scaled_sign()": ef.scaled_sign}
LEVELS = {
    "monitor": {},
    "monitor, every 10": {"every": 10},
    "monitor, age": {"age": True},
    "monitor, conservation": {"conservation": True},
}
"""The levels of a monitor; ``dense_mean`` costs a sum over the workers, of which there is one."""


def transformations(only: str, monitor: bool) -> dict[str, optax.GradientTransformation]:
    """Every feedback whose name has ``only`` in it, and with ``monitor`` at every level."""
    found = {name: ef.error_feedback(make()) for name, make in COMPRESSORS.items() if only in name}
    return found | {
        f"{name}, {level}": ef.monitor(tx, **options)
        for name, tx in found.items()
        for level, options in (LEVELS if monitor else {}).items()
    }


def contenders(
    batch_size: int, found: dict[str, optax.GradientTransformation]
) -> tuple[list[timing.Contender], int]:
    """The passes and each feedback, and the number of parameters."""
    model = models.create("resnet18", classes=10)
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    labels = jnp.arange(batch_size) % 10
    variables = jax.jit(lambda: model.init(jax.random.key(1), images, train=True))()
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss(params: Any) -> Any:
        logits, _ = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    passes = jax.jit(jax.grad(loss))
    gradients = jax.block_until_ready(passes(params))
    chosen = [
        timing.Contender("passes", lambda: params, lambda p: jax.block_until_ready(passes(p)))
    ]
    for name, tx in found.items():
        # The state comes first, so that its buffers, and not the updates, take the donated ones.
        step = jax.jit(lambda state, g, tx=tx: tx.update(g, state)[::-1], donate_argnums=0)
        state = {"now": step(tx.init(params), gradients)[0]}
        repeats = LEVELS[name.split(", ", 1)[1]].get("every", 1) if ", " in name else 1

        def run(gradients: Any, step: Any = step, state: Any = state, n: int = repeats) -> None:
            for _ in range(n):
                state["now"], _ = jax.block_until_ready(step(state["now"], gradients))

        chosen.append(timing.Contender(name, lambda: gradients, run, repeats))
    return chosen, sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--only", default="", help="time compressors with this in their name")
    parser.add_argument("--monitor", action="store_true", help="time every level of ef.monitor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each contender")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    found = transformations(flags.only, flags.monitor)
    chosen, size = contenders(flags.batch_size, found)
    taken = timing.measure(chosen, flags.rounds, flags.budget)
    print(f"ResNet-18, {size:,} parameters, batch of {flags.batch_size} images of 32 x 32")
    print(timing.lines(taken))
    shares: dict[str, list[float]] = {}
    for name in found:
        base, level = name.partition(", ")[::2]
        numbers = [(t[name], t[base], t["passes"]) for t in _clocks(taken)]
        shares[name] = [
            ((own - alone) if level else own) / (alone + p) for own, alone, p in numbers
        ]
        by_clock, by_cpu = (100 * x for x in shares[name])
        sign = "+" if level else ""
        print(
            f"{name}: {by_clock:{sign}.2f}% of a step, target {100 * TARGET:g}%; "
            f"{by_cpu:{sign}.2f}% of its processor time"
        )
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "shares": shares, "parameters": size}
    record |= {"batch_size": flags.batch_size}
    record["seconds"] = {name: list(one.seconds) for name, one in taken.items()}
    record["processor"] = {name: list(one.processor) for name, one in taken.items()}
    (flags.out / "share.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _clocks(taken: dict[str, timing.Timing]) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of the time of the clock, and of the processor time."""
    return (
        {name: one.median for name, one in taken.items()},
        {name: statistics.median(one.processor) for name, one in taken.items()},
    )


if __name__ == "__main__":
    main()
