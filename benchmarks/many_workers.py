"""Thousands of workers in one process: ``simulate`` against a loop written by hand.

``python -m benchmarks.many_workers``: EF21 with top-1 on logistic regression of the size of a9a
(32,561 rows, 123 features, 14 of them 1 in each row) and a non-convex regulariser, exact gradients,
1,000 rounds in one compiled ``lax.scan``. Both programs compute the same iterates; the hand-written
one is what a researcher would write for this one algorithm: a ``vmap`` over the workers' gradients,
an ``argmax`` and two scatters. Target: at most 1.3 times its time with 1,000 workers. ``--data``
takes the LibSVM file itself.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef_optax as ef
from benchmarks import timing

ROWS, FEATURES, ONES = 32_561, 123, 14
REGULARISER, RATE = 0.1, 0.02
TARGET = 1.3
AXIS = "workers"


def rows_of(workers: int, path: pathlib.Path | None) -> np.ndarray:
    """b_j a_j of every worker, (n, m, 123): the same number of rows each, without the remainder."""
    if path is None:
        rng = np.random.default_rng(0)
        # Popular and rare features, as in census data.
        weight = 1 / np.arange(1, FEATURES + 1)
        scores = rng.gumbel(size=(ROWS, FEATURES)) + np.log(weight)
        rows = np.zeros((ROWS, FEATURES))
        np.put_along_axis(rows, np.argsort(-scores, axis=1)[:, :ONES], 1.0, axis=1)
        rows *= np.where(rng.random(ROWS) < 0.24, 1.0, -1.0)[:, None]
    else:
        from experiments import libsvm

        features, labels = libsvm.read(path)
        rows = labels[:, None] * features
    each = len(rows) // workers
    return rows[: each * workers].reshape(workers, each, -1)


def gradient(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Gradient of one worker's objective: rows (m, d)."""
    data = -(jax.nn.sigmoid(-(rows @ x)) @ rows) / len(rows)
    return data + REGULARISER * 2 * x / (1 + x**2) ** 2


gradients = jax.vmap(gradient, (None, 0))


def simulated(rounds: int) -> Callable[[jax.Array], jax.Array]:
    """The library: any chain, any rule, any compressor."""

    def program(rows: jax.Array) -> jax.Array:
        chain = optax.chain(ef.ef21(ef.top_k(k=1), axis_name=AXIS), optax.sgd(RATE))
        tx = ef.simulate(chain, len(rows), AXIS)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            x, state = carry
            updates, state = tx.update(gradients(x, rows), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.zeros(rows.shape[-1], rows.dtype)
        return jax.lax.scan(step, (x, tx.init(x)), length=rounds)[0][0]

    return program


def by_hand(rounds: int) -> Callable[[jax.Array], jax.Array]:
    """EF21 with top-1 and nothing else."""

    def program(rows: jax.Array) -> jax.Array:
        n, _, d = rows.shape
        every = jnp.arange(n)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            x, g_i, g = carry
            difference = gradients(x, rows) - g_i
            place = jnp.argmax(jnp.abs(difference), axis=1)
            value = difference[every, place]
            g_i = g_i.at[every, place].add(value)
            g = g.at[place].add(value / n)
            return (x - RATE * g, g_i, g), None

        start = jnp.zeros(d, rows.dtype), jnp.zeros((n, d), rows.dtype), jnp.zeros(d, rows.dtype)
        return jax.lax.scan(step, start, length=rounds)[0][0]

    return program


def without_rule(rounds: int) -> Callable[[jax.Array], jax.Array]:
    """Gradient descent: the cost of the gradients alone."""

    def program(rows: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x - RATE * gradients(x, rows).mean(0), None

        return jax.lax.scan(step, jnp.zeros(rows.shape[-1], rows.dtype), length=rounds)[0]

    return program


PROGRAMS = {"simulate": simulated, "by hand": by_hand, "gradients alone": without_rule}


def run(
    workers: int, rounds: int, dtype: str, repeats: int, path: pathlib.Path | None
) -> dict[str, Any]:
    """Times all programs with this many workers."""
    rows = jnp.asarray(rows_of(workers, path), dtype)
    compiled = {
        name: jax.jit(make(rounds)).lower(rows).compile() for name, make in PROGRAMS.items()
    }
    ends = {name: np.asarray(program(rows)) for name, program in compiled.items()}
    apart = float(np.abs(ends["simulate"] - ends["by hand"]).max())
    contenders = [
        timing.Contender(
            name,
            lambda: rows,
            lambda given, program=program: jax.block_until_ready(program(given)),
        )
        for name, program in compiled.items()
    ]
    timings = timing.measure(contenders, repeats, budget=60.0)
    result: dict[str, Any] = {"workers": workers, "rounds": rounds, "dtype": dtype, "apart": apart}
    result["seconds"] = {
        name: {"median": taken.median, "quartiles": taken.quartiles, "best": taken.best}
        for name, taken in timings.items()
    }
    # The programs of one repeat run in turn, so their ratio is steadier than their times.
    pairs = zip(timings["simulate"].seconds, timings["by hand"].seconds, strict=False)
    result["ratio"] = float(np.median([own / hand for own, hand in pairs]))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        f"{'workers':>8} {'dtype':8} {'program':16} {'median s':>9} {'quartiles':>15} "
        f"{'x by hand':>10}"
    ]
    for result in results:
        for name, taken in result["seconds"].items():
            low, high = taken["quartiles"]
            ratio = f"{result['ratio']:.2f}" if name == "simulate" else ""
            lines.append(
                f"{result['workers']:8,} {result['dtype']:8} {name:16} {taken['median']:9.2f} "
                f"{f'{low:.2f} - {high:.2f}':>15} {ratio:>10}"
            )
    lines.append(
        "largest difference of the last iterates: "
        + ", ".join(
            f"{result['apart']:.0e} ({result['workers']:,}, {result['dtype']})"
            for result in results
        )
    )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=pathlib.Path, default=None, help="the LibSVM file a9a")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    results = []
    for dtype in flags.dtypes:
        with jax.enable_x64(dtype == "float64"):
            for workers in flags.workers:
                results.append(run(workers, flags.rounds, dtype, flags.repeats, flags.data))
    print(table(results))
    for result in results:
        if result["workers"] == 1000:
            print(f"1,000 workers, {result['dtype']}: {result['ratio']:.2f}, target {TARGET:g}")
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "results": results}
    path = flags.out / "many_workers.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
