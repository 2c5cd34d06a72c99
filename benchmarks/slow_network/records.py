"""Raw records of the benchmark: a line of JSON for each cell, and what a table needs of them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

FRAMES = 1448 / 1514
"""What TCP leaves of a rate that counts bytes of Ethernet frames, as ``tc`` does."""


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a run that was killed may leave half of one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a line."""
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if whole and not whole.endswith("\n"):
        path.write_text(whole[: whole.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method at a rate.

    Attributes:
      method: its name.
      workers: how many.
      rate: bits per second; None without a limit.
      seconds: of every timed step of all rounds; of methods with local steps, means of a period.
      received: bytes a step at a worker's interface, with the headers of packets.
    """

    method: str
    workers: int
    rate: float | None
    seconds: tuple[float, ...]
    received: float

    @property
    def median(self) -> float:
        """Median of the seconds of a step."""
        return statistics.median(self.seconds)


def cells(records: Iterable[dict[str, Any]]) -> dict[tuple[str, int, float | None], Cell]:
    """The cells by method, workers and rate; ``compute`` is the step without an exchange."""
    times: dict[tuple[str, int, float | None], list[float]] = {}
    moved: dict[tuple[str, int, float | None], list[float]] = {}
    for record in records:
        if record["kind"] == "run":
            key = record["method"], record["workers"], record["rate"]
            times.setdefault(key, []).extend(record["seconds"])
            moved.setdefault(key, []).append(record["received"])
    return {
        key: Cell(*key, tuple(seconds), statistics.median(moved[key]))
        for key, seconds in times.items()
    }


def step_seconds(answers: list[dict[str, Any]], period: int) -> list[float]:
    """Seconds of a step from those of all workers: the slowest decides.

    Local steps wait for nobody, so of these the periods are compared, not the steps.
    """
    each = [answer["seconds"] for answer in answers]
    if period > 1:
        return [max(sum(one) / len(one) for one in each)]
    return slowest(answers)


def slowest(answers: list[dict[str, Any]]) -> list[float]:
    """The largest of all workers' seconds, one by one."""
    return [max(one) for one in zip(*(answer["seconds"] for answer in answers), strict=True)]
