"""Runs the mutations: ``python -m tests.mutations --help``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import queue
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import mutations
from tests.mutations.mutation import Copy, Mutation, Result
from tests.paths import ROOT


def rooms() -> dict[str, tuple[Mutation, ...]]:
    """The mutations by room."""
    names = [m.name for m in pkgutil.iter_modules(mutations.__path__)]
    return {
        name: importlib.import_module(f"tests.mutations.{name}").MUTATIONS
        for name in names
        if name not in ("__main__", "mutation")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=mutations.__doc__.split("\n", 1)[0])
    parser.add_argument("--only", help="rooms, separated by commas")
    parser.add_argument("--match", default="", help="only faults whose words contain this")
    parser.add_argument("--jobs", type=int, default=1, help="mutations that run at once")
    parser.add_argument("--list", action="store_true", help="names them and runs nothing")
    options = parser.parse_args()
    every = rooms()
    chosen = options.only.split(",") if options.only else sorted(every)
    if unknown := set(chosen) - every.keys():
        parser.error(f"no room {sorted(unknown)}; there are {sorted(every)}")
    todo = [(room, m) for room in chosen for m in every[room] if options.match in m.fault]
    if options.list:
        for room, mutation in todo:
            print(f"{room:<12} {mutation.fault}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        return run(todo, Path(folder), options.jobs)


def run(todo: list[tuple[str, Mutation]], folder: Path, jobs: int) -> int:
    """Runs them, each beside at most ``jobs - 1`` others; 0 if all are caught."""
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(jobs):
        copies.put(Copy(ROOT, folder / str(number)))
    clean = copies.queue[0].tests(sorted({test for _, m in todo for test in m.tests}))
    if clean.returncode:
        print(clean.stdout[-3000:], clean.stderr[-1000:])
        print("The tests fail, or are not there, without any mutation; see above.")
        return 1

    def one(mutation: Mutation) -> Result:
        copy = copies.get()
        try:
            return copy.run(mutation)
        finally:
            copies.put(copy)

    words = []
    with ThreadPoolExecutor(jobs) as pool:
        for (room, mutation), result in zip(todo, pool.map(one, [m for _, m in todo]), strict=True):
            words.append(result.word)
            print(f"{result.word} {result.seconds:6.1f} s  {room}: {mutation.fault}", flush=True)
            print(f"{'':16} {result.detail}", flush=True)
    print(f"{words.count('caught')} of {len(words)} caught, {words.count('MISSED')} missed")
    return 0 if set(words) <= {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
