"""The sparse methods beside each other: link bytes and time of an exchange from 8 workers on.

All send one value in a hundred of a transformer of 25 million parameters. Bytes are exact; the
codec's seconds are measured on this machine (planner.codec_seconds); the link is the planner's
alpha-beta model, which has no other traffic on it. No optimizer and no gradient is in the time.

    python -m benchmarks.sparse_methods [--workers 8 16 32 64] [--bandwidth 1gbit] [--latency 50us]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax

import ef_optax as ef
from benchmarks import timing
from ef_optax.measure import planner

RATIO, PARAMETERS = 0.01, 25_000_000

METHODS = (
    planner.Method("dense float32", ef.identity(), ef.compressed_mean),
    planner.Method("gather(top_k)", ef.top_k(RATIO)),
    planner.Method("gather(block_top_k)", ef.block_top_k(RATIO)),
    planner.Method("largest_of_sum(top_k)", ef.exchanges.largest_of_sum(ef.top_k(RATIO))),
    planner.Method("two_shot(top_k)", ef.exchanges.two_shot(ef.top_k(RATIO))),
    planner.Method("leader(top_k)", ef.exchanges.leader(ef.top_k(RATIO))),
    planner.Method("arc_top_k", ef.arc_top_k(RATIO)),
)


def measure(workers: int, link: planner.Link) -> dict[str, tuple[float, float, float]]:
    """For each method: megabytes on a device's link, seconds of the codec, and of both together."""
    rows = planner.plan(PARAMETERS, workers, link, 0.0, methods=METHODS).rows
    return {
        row.method.name: (2 * row.received_bytes / 1e6, row.codec, row.codec + row.transfer)
        for row in rows
    }


def table(results: dict[int, dict[str, tuple[float, float, float]]]) -> str:
    """Megabytes and milliseconds, for each number of workers."""
    head = " | ".join(["| MB on the link, ms of an exchange", *(f"n = {n}" for n in results)])
    lines = [head + " |", "|---" + "|--:" * len(results) + "|"]
    for method in METHODS:
        cells = [results[n][method.name] for n in results]
        row = [f"{mb:,.1f} MB, {1e3 * both:,.0f} ms" for mb, _, both in cells]
        lines.append(" | ".join([f"| `{method.name}`", *row]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--latency", default="50us")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out"))
    flags = parser.parse_args()
    link = planner.Link(flags.bandwidth, flags.latency)
    hardware = timing.hardware()
    print(f"jax {jax.__version__}, {hardware}, {flags.bandwidth}, {flags.latency}")
    results = {n: measure(n, link) for n in flags.workers}
    print(table(results))
    flags.out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware, "jax": jax.__version__, "results": results}
    path = flags.out / "sparse_methods.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
