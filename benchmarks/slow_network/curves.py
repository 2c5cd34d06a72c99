"""Loss against seconds: losses from training once without a limit, seconds from the timed cells.

A method sends the same messages whatever the links are, so its losses by step do not depend on
them. Each method and seed is trained once over links without a limit, and the time of its steps at
a rate is that of its cell. :func:`live` is the check of it: the same training over slow links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks.slow_network import records as raw
from experiments import lines

COMPARED = (
    "dense float32",
    "scaled_sign, two_shot",
    "power_sgd(4)",
    "DiLoCo, H = 30",
    "SparseLoCo, H = 30",
)
GRID = (5e-4, 1e-3, 2e-3)
"""Learning rates of Adam, of which each method gets the best on the tuning split."""

EVERY = 30
"""Steps between two losses, after which no method with local steps is between two exchanges."""

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Curve:
    """A training run.

    Attributes:
      method: its name.
      seed: of the first parameters and of the rows of text.
      learning_rate: Adam's.
      losses: held-out loss in nats a character, at first and after every ``EVERY`` steps.
    """

    method: str
    seed: int
    learning_rate: float
    losses: tuple[float, ...]

    def steps_to(self, loss: float) -> float | None:
        """Steps until this loss, between two measurements on a straight line; None if never."""
        for i, (before, after) in enumerate(zip(self.losses, self.losses[1:], strict=False)):
            if after <= loss:
                return EVERY * (i + (before - loss) / (before - after))
        return None


def request(learning_rate: float, seed: int, steps: int, tuning: bool) -> dict[str, Any]:
    """What identifies a run, beside its method."""
    return {"learning_rate": learning_rate, "seed": seed, "steps": steps, "tuning": tuning}


def best_rate(records: Iterable[dict[str, Any]], method: str) -> float:
    """The learning rate with the least last loss on the tuning split."""
    tuned = [r for r in records if r["kind"] == "curve" and r["method"] == method and r["tuning"]]
    return min(tuned, key=lambda r: r["losses"][-1])["learning_rate"]


def curves(records: Iterable[dict[str, Any]]) -> list[Curve]:
    """The runs of all seeds, without those that chose a learning rate or that were live."""
    found = [r for r in records if r["kind"] == "curve" and r["rate"] is None and not r["tuning"]]
    return [Curve(r["method"], r["seed"], r["learning_rate"], tuple(r["losses"])) for r in found]


def seconds_to(
    found: Iterable[Curve],
    cells: dict[Any, raw.Cell],
    workers: int,
    rate: float | None,
    loss: float,
) -> dict[str, list[float | None]]:
    """Seconds of each method until a loss, by seed: steps until then times the time of a step."""
    result: dict[str, list[float | None]] = {}
    for curve in found:
        steps = curve.steps_to(loss)
        cell = cells[curve.method, workers, rate]
        result.setdefault(curve.method, []).append(None if steps is None else steps * cell.median)
    return result


def learn(bench: Any, fleet: Any, names: Iterable[str], steps: int) -> None:
    """Half a training with every learning rate of the grid, then all seeds with the best one."""
    for name in names:
        for rate in GRID:
            half = steps // 2 // EVERY * EVERY
            bench.train(fleet, name, None, request(rate, 0, half, tuning=True))
        best = best_rate(lines.read(bench.path), name)
        for seed in range(SEEDS):
            bench.train(fleet, name, None, request(best, seed, steps, tuning=False))


def live(bench: Any, fleet: Any, names: Iterable[str], link: float, steps: int) -> None:
    """Trains over links of a rate, with the first rows of the first seed."""
    for name in names:
        best = best_rate(lines.read(bench.path), name)
        bench.train(fleet, name, link, request(best, 0, steps, tuning=False))
