"""Part *tests*: how many tests there are, and what each file takes in processor seconds."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.record import plugin

STAGES = {"fast": (), "slow": ("-m", "slow")}
OUTCOMES = ("passed", "failed", "skipped", "xpassed", "xskipped", "error")


def record(stage: str, jobs: int, paths: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs one stage as ``make`` does and returns what it took, by file."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.record.plugin", "-q"]
    command += ["-n", str(jobs), "--dist", "worksteal", *STAGES[stage], *paths]
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        done = subprocess.run(command, env=environment() | {plugin.DIRECTORY: directory})
        seconds = time.perf_counter() - start
        files, slow = merged(pathlib.Path(directory))
    return {
        "exit_code": done.returncode,
        "jobs": jobs,
        "wall_seconds": seconds,
        "cpu_seconds": sum(row["cpu_seconds"] for row in files.values()),
        "collect_cpu_seconds": sum(row["collect_cpu_seconds"] for row in files.values()),
        "counts": dict(sum((outcomes(row) for row in files.values()), collections.Counter())),
        "files": files,
        "slow_tests": slow,
    }


def environment() -> dict[str, str]:
    """The variables with which ``make`` runs the tests."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count=8".strip()
    return {"PJRT_NPROC": "16", **os.environ, "XLA_FLAGS": flags}


def merged(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The sums over all processes, dearest file first, and the tests that are slow alone."""
    files: dict[str, collections.Counter[str]] = {}
    slow: dict[str, float] = {}
    for path in sorted(directory.glob("*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        for name, row in part["files"].items():
            files.setdefault(name, collections.Counter()).update(row)
        slow |= part["slow"]
    order = sorted(files, key=lambda name: -files[name]["cpu_seconds"])
    rows = {name: dict(files[name]) for name in order if files[name]["wall_seconds"]}
    return rows, dict(sorted(slow.items(), key=lambda item: -item[1]))


def outcomes(row: dict[str, Any]) -> collections.Counter[str]:
    """The counts of one file."""
    return collections.Counter({k: row[k] for k in OUTCOMES if k in row})


def table(recorded: dict[str, Any], top: int = 25) -> str:
    """The dearest files as Markdown."""
    total = recorded["cpu_seconds"]
    lines = [
        f"{recorded['counts']}: {recorded['wall_seconds']:.0f} s with {recorded['jobs']} processes,"
        f" {total:.0f} processor seconds in tests, {recorded['collect_cpu_seconds']:.0f} to import",
        "",
        "| file | tests | processor s | wall s | share |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in list(recorded["files"].items())[:top]:
        share = f"{100 * row['cpu_seconds'] / total:.1f}%"
        tests = sum(outcomes(row).values())
        cells = (name, tests, f"{row['cpu_seconds']:.1f}", f"{row['wall_seconds']:.1f}", share)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
