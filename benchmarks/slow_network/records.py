"""What a table needs of the raw records, which are a line of JSON for each cell."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

FRAMES = 1448 / 1514
"""What TCP leaves of a rate that counts bytes of Ethernet frames, as ``tc`` does."""


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
