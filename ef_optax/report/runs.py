"""What runs left in their folders."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class ReportError(Exception):
    """A folder without what a report needs; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class Method:
    """All seeds of one method of one folder.

    Attributes:
      name: as in the files, with the folder's name before it if several folders are compared.
      seeds: the rows of each seed, in the order of time.
      unit: ``"epoch"`` or ``"step"``, in which the rows count time.
      steps_per_unit: exchanges from one unit of time to the next.
      message_bytes: what a worker contributes to a step; None if it is not known.
      link_bytes: what it sends and receives in a step; None if it is not known.
      dense_bytes: what it would contribute without compression; None if it is not known.
    """

    name: str
    seeds: tuple[tuple[Row, ...], ...]
    unit: str
    steps_per_unit: float
    message_bytes: float | None
    link_bytes: float | None
    dense_bytes: float | None

    def curve(self, quantity: str) -> list[tuple[float, list[float]]]:
        """Time, and the values of all seeds that have one, in the order of time."""
        values: dict[float, list[float]] = {}
        for rows in self.seeds:
            for row in rows:
                value = row.get(quantity)
                if isinstance(value, int | float) and math.isfinite(value):
                    values.setdefault(row[self.unit], []).append(float(value))
        return sorted(values.items())

    def last(self, quantity: str) -> list[float]:
        """The last value of each seed."""
        found = []
        for rows in self.seeds:
            numbers = [r[quantity] for r in rows if isinstance(r.get(quantity), int | float)]
            found += [float(x) for x in numbers[-1:] if math.isfinite(x)]
        return found

    def monitored(self) -> list[tuple[float, Mapping[str, float]]]:
        """Time and statistics of the first seed that has some."""
        for rows in self.seeds:
            found = [(row[self.unit], row["monitor"]) for row in rows if row.get("monitor")]
            if found:
                return found
        return []


def read(folders: Sequence[Path]) -> list[Method]:
    """All methods of all folders.

    Raises:
      ReportError: if a folder has no metrics.
    """
    methods = []
    for folder in folders:
        start = f"{folder.name}: " if len(folders) > 1 else ""
        methods += _of_folder(folder, start)
    return methods


def _of_folder(folder: Path, start: str) -> Iterable[Method]:
    rows = _rows(folder / "metrics.jsonl")
    about = _json(folder / "config.json").get("about", {})
    wire = _json(folder / "wire.json")
    unit = "epoch" if all("epoch" in row for row in rows) else "step"
    if not all(isinstance(row.get(unit), int | float) for row in rows):
        raise ReportError(
            f"{folder / 'metrics.jsonl'}: every line needs a number 'epoch', or every line 'step'"
        )
    by_name: dict[str, dict[Any, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row[unit]):
        seeds = by_name.setdefault(str(row.get("method", folder.name)), {})
        seeds.setdefault(row.get("seed", 0), []).append(row)
    for name, seeds in by_name.items():
        sent = wire.get(name, {})
        yield Method(
            name=f"{start}{name}",
            seeds=tuple(tuple(seed) for seed in seeds.values()),
            unit=unit,
            steps_per_unit=about.get("steps_per_epoch", 1) if unit == "epoch" else 1,
            message_bytes=sent.get("message_bytes"),
            link_bytes=sent.get("link_bytes"),
            dense_bytes=about.get("dense_bytes"),
        )


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise ReportError(
            f"{path} does not exist; give a folder that experiments.train wrote, or write one JSON "
            "object per line with 'epoch' (or 'step') and the metrics"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ReportError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise ReportError(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    if not rows:
        raise ReportError(f"{path} is empty: no epoch was finished")
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error})") from None
    return found if isinstance(found, dict) else {}
