"""The share of error feedback in the computation of a ResNet-18 training step, on one worker.

The benchmark times the forward and backward pass at a batch size, and the update of error feedback
alone on gradients of the same 11 million parameters, with residuals in place. Nothing crosses a
wire. The share is feedback / (feedback + passes). With --monitor each feedback is also timed at
every level of ``ef.monitor``; the overhead is what the level adds, over the unmonitored step.
Medians of interleaved runs in one process.

    python -m benchmarks.share [--monitor] [--batch_size 32] [--rounds 5] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
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
    "monitor, age": {"age": True},
    "monitor, conservation": {"conservation": True},
}
"""The levels of a monitor; ``dense_mean`` costs a sum over the workers, of which there is one."""


def transformations(monitor: bool) -> dict[str, optax.GradientTransformation]:
    """Every feedback, and with ``monitor`` each of them at every level."""
    found = {name: ef.error_feedback(make()) for name, make in COMPRESSORS.items()}
    levels = LEVELS if monitor else {}
    return found | {
        f"{name}, {level}": ef.monitor(found[name], **options)
        for name in COMPRESSORS
        for level, options in levels.items()
    }


def contenders(batch_size: int, monitor: bool) -> tuple[list[timing.Contender], int]:
    """The passes and each feedback, and the number of parameters."""
    model = models.create("resnet18", classes=10)
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    labels = jnp.arange(batch_size) % 10
    variables = jax.jit(lambda: model.init(jax.random.key(1), images, train=True))()
    params, statistics = variables["params"], variables["batch_stats"]

    def loss(params: Any) -> Any:
        logits, _ = model.apply(
            {"params": params, "batch_stats": statistics}, images, True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    passes = jax.jit(jax.grad(loss))
    gradients = jax.block_until_ready(passes(params))
    found = [timing.Contender("passes", lambda: params, lambda p: jax.block_until_ready(passes(p)))]
    for name, tx in transformations(monitor).items():
        update = jax.jit(tx.update, donate_argnums=1)
        state = {"now": update(gradients, tx.init(params))[1]}

        def run(gradients: Any, update: Any = update, state: dict[str, Any] = state) -> None:
            _, state["now"] = jax.block_until_ready(update(gradients, state["now"]))

        found.append(timing.Contender(name, lambda: gradients, run))
    return found, sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--monitor", action="store_true", help="time every level of ef.monitor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each contender")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    chosen, size = contenders(flags.batch_size, flags.monitor)
    taken = timing.measure(chosen, flags.rounds, flags.budget)
    print(f"ResNet-18, {size:,} parameters, batch of {flags.batch_size} images of 32 x 32")
    print(timing.lines(taken))
    passes = taken["passes"].median
    shares = {name: taken[name].median / (taken[name].median + passes) for name in COMPRESSORS}
    for name, share in shares.items():
        print(f"{name}: {100 * share:.2f}% of a step, target {100 * TARGET:g}%")
    overheads = {
        f"{name}, {level}": (taken[f"{name}, {level}"].median - taken[name].median)
        / (taken[name].median + passes)
        for name in COMPRESSORS
        for level in (LEVELS if flags.monitor else ())
    }
    for name, overhead in overheads.items():
        print(f"{name}: {100 * overhead:+.2f}% of a step, target {100 * TARGET:g}%")
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "shares": shares, "parameters": size}
    record |= {"batch_size": flags.batch_size, "overheads": overheads}
    record["seconds"] = {name: list(one.seconds) for name, one in taken.items()}
    (flags.out / "share.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
