"""``python -m benchmarks``: all CPU benchmarks one after the other, each with its defaults."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("codec", "low_rank", "share")


def main() -> None:
    """Runs each benchmark in a separate process and passes the given flags to all of them."""
    for name in BENCHMARKS:
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
