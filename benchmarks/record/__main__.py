"""Writes what must not change when code only moves, and compares two such records.

    python -m benchmarks.record write FILE.json [--parts trajectories,wire] [--jobs 2] [--thorough]
    python -m benchmarks.record compare OLD.json NEW.json

``write`` keeps the parts that FILE has and was not asked for. ``compare`` prints what differs and
ends with 1 if checksums, bits, constants or collectives do, or tests fail; times are given as
ratios. Parts:

  trajectories  checksums of the updates and parameters of every rule in every mode
  wire          bits, traffic, constants and compiled collectives of every codec
  compile       seconds to the first step, by ``benchmarks.first_step``
  codec         ``benchmarks.codec`` in times its floor
  tests         counts, and seconds by file, of the fast stage
  slow          the same of the slow stage (only where it is asked for)
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.record import suite


def trajectories(flags: argparse.Namespace) -> dict[str, Any]:
    """The parts import what they need when they run, after the environment is set."""
    from benchmarks.record import trajectories

    return trajectories.in_haste(flags.thorough)


def wire(flags: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.record import wire

    return wire.record()


def compile_times(flags: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.record import costs

    return costs.compile_times()


def codec(flags: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.record import costs

    return costs.codec_ratios()


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "trajectories": trajectories,
    "wire": wire,
    "compile": compile_times,
    "codec": codec,
    "tests": lambda flags: suite.record("fast", flags.jobs),
    "slow": lambda flags: suite.record("slow", flags.jobs),
}


def write(path: pathlib.Path, flags: argparse.Namespace) -> None:
    """Records the parts one after another; each is written as soon as it is there."""
    os.environ.update(suite.environment())  # before JAX is imported
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in flags.parts:
        part = {"made": made()} | PARTS[name](flags)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        kept[name] = part
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if name in ("tests", "slow"):
            print(suite.table(part), flush=True)


def made() -> dict[str, str]:
    """Where and with what a part was made."""
    from importlib.metadata import version

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    own = {"commit": git.stdout.strip(), "python": sys.version.split()[0]}
    return own | packages | {"hardware": timing.hardware()}


def compare(old: pathlib.Path, new: pathlib.Path) -> int:
    """Prints the differences; 1 if there is one that must not be."""
    from benchmarks.record import compare

    records = [json.loads(path.read_text(encoding="utf-8")) for path in (old, new)]
    found = list(compare.differences(*records))
    for wrong, line in found:
        print(f"{'DIFFERS' if wrong else 'note':8}{line}")
    wrong = sum(wrong for wrong, _ in found)
    print(f"{wrong} differences of what must be equal, {len(found) - wrong} notes")
    return int(wrong > 0)


def parts_of(text: str) -> list[str]:
    """Reads names of parts that are joined by commas."""
    unknown = set(text.split(",")) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {list(PARTS)}")
    return text.split(",")


def main() -> int:
    """Runs the command line."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.record", description=__doc__, formatter_class=text)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write")
    one.add_argument("path", type=pathlib.Path)
    default = [part for part in PARTS if part != "slow"]
    one.add_argument("--parts", type=parts_of, default=default, help="joined by commas")
    one.add_argument("--jobs", type=int, default=2, help="processes that run the tests")
    one.add_argument("--thorough", action="store_true", help="trajectories in all modes")
    two = commands.add_parser("compare")
    two.add_argument("old", type=pathlib.Path)
    two.add_argument("new", type=pathlib.Path)
    flags = parser.parse_args()
    if flags.command == "write":
        write(flags.path, flags)
        return 0
    return compare(flags.old, flags.new)


if __name__ == "__main__":
    sys.exit(main())
