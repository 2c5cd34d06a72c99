"""What PowerSGD costs beyond its matrix products, on one leaf.

The step adds the residual to the gradient, multiplies by Q, makes the columns orthonormal,
multiplies back, and writes the aggregate P Q^T and the new residual. It is compared with the three
products alone, M Q, M^T P and P Q^T, from existing matrices. Medians of interleaved runs.

    python -m benchmarks.low_rank [--side 4096] [--rank 4] [--rounds 15] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ef_optax as ef
from benchmarks import program, timing
from ef_optax._core.workers import Workers

TARGET = 1.5


def contenders(side: int, rank: int) -> list[timing.Contender]:
    """The step, the products alone, and the floor."""
    codec = ef.power_sgd(rank).codec
    rng = np.random.default_rng(0)
    g, e = (jnp.asarray(rng.standard_normal((side, side), dtype=np.float32)) for _ in range(2))
    P, Q = (jnp.asarray(rng.standard_normal((side, rank), dtype=np.float32)) for _ in range(2))

    def step(g: jax.Array, e: jax.Array, out: jax.Array, Q: jax.Array) -> Any:
        del out  # only overwritten
        protocol = codec.protocol(g + e, Q, Workers(1, 0, jnp.zeros((), jnp.int32)))
        try:
            answer = next(protocol).value  # with one worker the mean is its own value
            while True:
                answer = protocol.send(answer).value
        except StopIteration as stop:
            outcome = stop.value
        return outcome.residual(), outcome.aggregate, outcome.state

    def products(M: jax.Array, out: jax.Array, P: jax.Array, Q: jax.Array) -> Any:
        del out
        return P @ Q.T, M @ Q, M.T @ P

    def floor(g: jax.Array, e: jax.Array) -> jax.Array:
        return g + e

    return [
        program.contender("floor", floor, g, e)[0],
        program.contender("products", products, g, e, P, Q)[0],
        program.contender("step", step, g, e, e, Q)[0],
    ]


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each contender")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    taken = timing.measure(contenders(flags.side, flags.rank), flags.rounds, flags.budget)
    print(timing.lines(taken))
    ratio = taken["step"].median / taken["products"].median
    print(f"power_sgd({flags.rank}) on {flags.side} x {flags.side}: {ratio:.2f} times its products")
    print(f"target {TARGET:g}")
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "ratio": ratio}
    record["seconds"] = {name: list(one.seconds) for name, one in taken.items()}
    (flags.out / "low_rank.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
