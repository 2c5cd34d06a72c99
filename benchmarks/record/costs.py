"""Parts *compile* and *codec*: what other benchmarks measure, a small set of it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import first_step

CELLS = {
    (tree, mode, method)
    for tree, mode in (("gpt", "explicit"), ("resnet50", "explicit"), ("toy", "simulate"))
    for method in ("dense", "identity", "scaled_sign", "top_k")
}
SIZES = (1 << 20, 1 << 22)


def compile_times() -> dict[str, Any]:
    """Seconds to the first step, in a process of its own for each cell."""
    start, cells = time.perf_counter(), {}
    for tree, mode, method in sorted(CELLS):
        name = f"{tree}/{mode}/{method}"
        cells[name] = first_step.measure(tree, method, mode)
        peer = cells[f"{tree}/{mode}/{first_step.DENSE}"]
        for total in ("total", "cpu_total"):
            cells[name][f"{total} times dense"] = cells[name][total] / peer[total]
        print(f"compile, {name}: {cells[name]['cpu_total']:.1f} s", flush=True)
    return {"cells": cells, "seconds": {"wall_seconds": time.perf_counter() - start}}


def codec_ratios() -> dict[str, Any]:
    """What ``python -m benchmarks.codec`` measures, in times its floor."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        sizes = [str(size) for size in SIZES]
        command = [sys.executable, "-m", "benchmarks.codec", "--out", directory, "--sizes", *sizes]
        subprocess.run(command, check=True)
        path = pathlib.Path(directory) / "codec.json"
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    kept = ("floors", "floors_best", "bytes_per_element", "peak_bytes_per_element")
    rows = {
        f"{size}/{name}": {key: row[key] for key in kept if key in row}
        for size, by_name in results.items()
        for name, row in by_name.items()
    }
    return {"rows": rows, "seconds": {"wall_seconds": time.perf_counter() - start}}
