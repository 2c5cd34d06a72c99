"""From folders of runs to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ef_optax.report.charts import altair
from ef_optax.report.page import bundler, page
from ef_optax.report.runs import ReportError, read


def write(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    bandwidth: float | None = None,
    dense: str | None = None,
) -> Path:
    """Writes the report about the runs in some folders, and returns where it is."""
    methods = read(folders)
    if dense is not None and dense not in [m.name for m in methods]:
        names = ", ".join(m.name for m in methods)
        raise ReportError(f"--dense={dense} is none of the methods: {names}")
    path = out or folders[0] / "report.html"
    title = ", ".join(folder.name for folder in folders)
    path.write_text(page(methods, title, bandwidth=bandwidth, dense=dense), encoding="utf-8")
    return path


def require() -> None:
    """Refuses to go on without the packages that the charts need.

    Raises:
      ReportError: if one is missing; the message has the remedy.
    """
    altair()
    bundler()
