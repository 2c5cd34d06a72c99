"""The command: ``python -m ef_optax.report runs/a [runs/b ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ef_optax.report import ReportError, write


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ef_optax.report",
        description="Writes one HTML page about some runs; it opens without a network.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first")
    parser.add_argument("--dense", help="the uncompressed method; default: found by its bytes")
    parser.add_argument(
        "--bandwidth", type=float, help="of a worker's link, in bits per second, for the seconds"
    )
    flags = parser.parse_args(arguments)
    if flags.bandwidth is not None and not flags.bandwidth > 0:
        parser.error(f"--bandwidth={flags.bandwidth:g} must be positive")
    try:
        path = write(flags.folders, flags.out, bandwidth=flags.bandwidth, dense=flags.dense)
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
