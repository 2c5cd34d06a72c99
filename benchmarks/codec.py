"""What an error-feedback step costs on one worker, against a floor and two peers.

Step (i) adds the residual to the gradient, makes the packed message and writes the new residual
over the old one. Step (ii) also writes the dense aggregate of one worker into a donated
buffer. The floor is ``e <- g + e``, donated: the step with no compression at all. "obvious"
is (i) by the backend's own operations (`lax.top_k`, `packbits`), with indices of 32 bits; "torch"
is (i) in PyTorch; "no draw" is (i) of a random codec with 1/2 in place of every random number.
Figures are medians of interleaved runs in one process, with quartiles; each run gets newly made
arguments, outside the clock.

    python -m benchmarks.codec [--sizes 1048576 4194304 25000000] [--rounds 9] [--only top_k]
                               [--out DIR] [--merge]

prints the table and writes ``codec.json`` and ``codec.png``; ``--merge`` keeps the other rows of an
earlier run. Without PyTorch its rows are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ef_optax as ef
from benchmarks import peers, program, timing
from ef_optax._core.codec import Codec
from ef_optax._numeric import random

RATIO = 0.01
BUCKET = 512
FLOOR = "floor"


@dataclasses.dataclass(frozen=True)
class Case:
    """One compressor, its peers, and how many times the floor it may cost.

    Attributes:
      name: of the compressor.
      codec: what is timed.
      obvious: the step in plain JAX, for a size.
      torch: the step in PyTorch, for a size.
      targets: times the floor, for (i) and (ii); None if there is none.
      again: whether the sum of gradient and residual is computed a second time for the residual,
        which avoids storing it if the codec only streams through it.
    """

    name: str
    codec: Codec
    obvious: Callable[[int], Callable[..., Any]]
    torch: Callable[[int], Callable[..., Any]]
    targets: tuple[float | None, float | None]
    again: bool = False

    def step(self, aggregate: bool) -> Callable[..., Any]:
        """The step as one function of gradient, residual and (for ii) the buffer to fill."""

        def message_and_residual(g: jax.Array, e: jax.Array) -> Any:
            p = g + e
            message = self.codec.encode(p, self._key(g))
            if self.again:
                g, e = lax.optimization_barrier((g, e))
                p = g + e
            return message, self.codec.residual(p, message)

        def with_aggregate(g: jax.Array, e: jax.Array, old: jax.Array) -> Any:
            message, residual = message_and_residual(g, e)
            gathered = jax.tree.map(lambda part: part[None], message)
            like = jax.ShapeDtypeStruct(old.shape, old.dtype)
            return message, residual, self.codec.decode_mean(gathered, like)

        return with_aggregate if aggregate else message_and_residual

    def without_draws(self) -> Callable[..., Any]:
        """The step (i) with 1/2 in place of every random number."""
        step = self.step(aggregate=False)

        def constant(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            del key
            return jnp.full(shape, 1 << 31, jnp.uint32)

        def traced(g: jax.Array, e: jax.Array) -> Any:
            with mock.patch.object(random, "random_words", constant):
                return step(g, e)

        return traced

    def _key(self, g: jax.Array) -> jax.Array | None:
        """A key unknown at compile time, so the draws are not folded into constants."""
        if self.codec.deterministic:
            return None
        return jax.random.key(lax.bitcast_convert_type(g[0], jnp.uint32))


def cases() -> list[Case]:
    """The compressors that are timed."""
    in_block = int(np.ceil(RATIO * peers.BLOCK))
    return [
        Case(
            f"top_k({RATIO})",
            ef.top_k(RATIO).codec,
            lambda size: peers.obvious_top_k(int(np.ceil(RATIO * size))),
            lambda size: peers.torch_top_k(int(np.ceil(RATIO * size))),
            (6.0, 8.0),
        ),
        Case(
            f"block_top_k({RATIO})",
            ef.block_top_k(RATIO, block=peers.BLOCK).codec,
            lambda size: peers.obvious_block_top_k(in_block),
            lambda size: peers.torch_block_top_k(in_block),
            (4.0, None),
        ),
        Case(
            "scaled_sign()",
            ef.scaled_sign().codec,
            lambda size: peers.obvious_scaled_sign(),
            lambda size: peers.torch_scaled_sign(),
            (2.0, None),
            again=True,
        ),
        Case(
            f"qsgd(7, bucket={BUCKET})",
            ef.qsgd(7, key=0, bucket=BUCKET).codec,
            lambda size: peers.obvious_qsgd(7, BUCKET),
            lambda size: peers.torch_qsgd(7, BUCKET),
            (None, None),
        ),
    ]


# What a random codec may cost without its random numbers, times the floor.
NO_DRAW_TARGET = 4.0


def contenders_of(size: int, chosen: list[Case]) -> tuple[list[timing.Contender], dict[str, Any]]:
    """All contenders at one size, compiled, and what compiling them showed."""
    rng = np.random.default_rng(0)
    host_g = rng.standard_normal(size, dtype=np.float32)
    # A residual as after some steps: mostly entries too small to be sent.
    host_e = np.clip(rng.standard_normal(size, dtype=np.float32) * 2, -2.5, 2.5)
    g, e = jnp.asarray(host_g), jnp.asarray(host_e)
    compiled: dict[str, Any] = {}
    contenders: list[timing.Contender] = []

    def add(name: str, step: Callable[..., Any], *arguments: jax.Array) -> None:
        one, compiled[name] = program.contender(name, step, *arguments)
        contenders.append(one)

    add(FLOOR, lambda g, e: g + e, g, e)
    for case in chosen:
        add(f"{case.name} (i)", case.step(aggregate=False), g, e)
        if not case.codec.deterministic:
            add(f"{case.name} no draw", case.without_draws(), g, e)
        add(f"{case.name} (ii)", case.step(aggregate=True), g, e, e)
        add(f"{case.name} obvious", case.obvious(size), g, e)
        if peers.has_torch():
            step = case.torch(size)
            tensors = (peers.to_torch(host_g), peers.to_torch(host_e))
            contenders.append(
                timing.Contender(
                    f"{case.name} torch",
                    lambda tensors=tensors: tensors,
                    lambda pair, step=step: step(*pair),
                )
            )
    return contenders, compiled


def run(
    sizes: list[int], rounds: int, budget: float, chosen: list[Case]
) -> dict[str, dict[str, Any]]:
    """Times everything; returns rows by size and name."""
    results: dict[str, dict[str, Any]] = {}
    for size in sizes:
        contenders, compiled = contenders_of(size, chosen)
        timings = timing.measure(contenders, rounds, budget)
        floor = timings[FLOOR]
        results[str(size)] = {
            name: {
                "median_ms": 1e3 * taken.median,
                "quartiles_ms": [1e3 * q for q in taken.quartiles],
                "best_ms": 1e3 * taken.best,
                "rounds": len(taken.seconds),
                "floors": taken.median / floor.median,
                "floors_best": taken.best / floor.best,
                **compiled.get(name, {}),
            }
            for name, taken in timings.items()
        }
        print(table(size, results[str(size)]), flush=True)
    return results


def table(size: int, rows: dict[str, Any]) -> str:
    """The rows of one size as text.

    B/value is what the program reads and writes (XLA's count), peak the memory that it needs beyond
    its arguments (message and temporary buffers), both in bytes per value.
    """
    lines = [
        f"\n{size:,} float32 values",
        f"{'step':28} {'median ms':>10} {'quartiles':>17} {'best':>8} {'x floor':>8} "
        f"{'best/best':>9} {'B/value':>8} {'peak':>6} {'compile s':>9}",
    ]
    for name, row in rows.items():
        low, high = row["quartiles_ms"]
        line = (
            f"{name:28} {row['median_ms']:10.2f} {f'{low:.2f} - {high:.2f}':>17} "
            f"{row['best_ms']:8.2f} {row['floors']:8.2f} {row['floors_best']:9.2f}"
        )
        if "bytes_per_element" in row:
            line += f" {row['bytes_per_element']:8.1f} {row['peak_bytes_per_element']:6.2f}"
            line += f" {row['compile_seconds']:9.2f}"
        lines.append(line)
    return "\n".join(lines)


def comparison(results: dict[str, dict[str, Any]], chosen: list[Case]) -> str:
    """Targets against the measurements at the largest size, and growth with the size."""
    sizes = sorted(results, key=int)
    rows = results[sizes[-1]]
    lines = [f"\nat {int(sizes[-1]):,} values, by medians:"]
    for case in chosen:
        own = rows.get(f"{case.name} (i)")
        if own is None:
            continue
        parts = zip(("(i)", "(ii)"), case.targets, strict=True)
        parts = [*parts, ("no draw", None if case.codec.deterministic else NO_DRAW_TARGET)]
        for part, target in parts:
            if target is not None:
                row = rows[f"{case.name} {part}"]
                reached = f"{row['floors']:.2f} floors ({row['floors_best']:.2f} by fastest rounds)"
                lines.append(f"  {case.name} {part}: {reached}, target {target:g}")
        for peer in ("obvious", "torch"):
            if f"{case.name} {peer}" in rows:
                gain = rows[f"{case.name} {peer}"]["median_ms"] / own["median_ms"]
                lines.append(f"  {case.name}: {gain:.1f} times faster than {peer}")
        for size in sizes[:-1]:
            before = results[size].get(f"{case.name} (i)")
            if before is not None:
                growth = own["floors"] / before["floors"]
                lines.append(f"  {case.name}: floors grow {growth:.2f} from {int(size):,} values")
    return "\n".join(lines)


def chart(rows: dict[str, Any], size: int, chosen: list[Case], path: pathlib.Path) -> None:
    """Bars of times the floor, on a logarithmic axis, with the targets.

    The bars show the fastest rounds: other work on the machine slows the short floor most, so
    ratios of medians flatter every step.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [case for case in chosen if f"{case.name} (i)" in rows]
    parts = [("(i)", "ef_optax"), ("(ii)", "ef_optax, with aggregate")]
    parts += [("obvious", "plain JAX"), ("torch", "PyTorch")]
    colours = ["#1b6ca8", "#7fb3d5", "#b0b0b0", "#e0a458"]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    height = 0.2
    for place, (part, label) in enumerate(parts):
        values = [rows.get(f"{case.name} {part}", {}).get("floors_best") for case in chosen]
        if not any(values):
            continue
        where = [i + (place - 1.5) * height for i in range(len(chosen))]
        lengths = [value or 0 for value in values]
        bars = axes.barh(where, lengths, height, label=label, color=colours[place])
        labels = [f"{value:.1f}" if value else "" for value in values]
        axes.bar_label(bars, labels, padding=8, fontsize=8)
    for i, case in enumerate(chosen):
        for place, target in enumerate(case.targets):
            if target is not None:
                y = i + (place - 1.5) * height
                axes.plot([target] * 2, [y - height / 2, y + height / 2], color="black", lw=2)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2 * max(row["floors_best"] for row in rows.values()))
    axes.set_yticks(range(len(chosen)), [case.name for case in chosen])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / time of e <- g + e, fastest rounds   (black marks: targets)")
    axes.set_title(f"Error-feedback step of one worker, {size:,} float32 values, CPU")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 20, 1 << 22, 25_000_000])
    parser.add_argument("--rounds", type=int, default=9, help="most runs of each contender")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each contender")
    parser.add_argument("--only", nargs="+", default=None, help="compressors, by name")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    parser.add_argument("--merge", action="store_true", help="keep the rows that --out has")
    flags = parser.parse_args()
    timing.one_device()
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}")
    chosen = [c for c in cases() if flags.only is None or c.name.split("(")[0] in flags.only]
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / "codec.json"
    results = run(flags.sizes, flags.rounds, flags.budget, chosen)
    if flags.merge and path.exists():
        results = merged(json.loads(path.read_text(encoding="utf-8"))["results"], results)
    print(comparison(results, cases()))
    record = {"hardware": hardware, "jax": jax.__version__, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    largest = max(results, key=int)
    chart(results[largest], int(largest), cases(), flags.out / "codec.png")


def merged(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows of both, the newer if both have one; each keeps the floor of its own run."""
    return {size: {**before.get(size, {}), **now.get(size, {})} for size in {**before, **now}}


if __name__ == "__main__":
    main()
