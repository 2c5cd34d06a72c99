"""Whether error feedback closes the gap to the uncompressed run, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from ef_optax.report.runs import Method

QUANTITY = "test_accuracy"
MEMORY = "ef_"
"""How the short name of a method with error feedback begins; the rest names the one without."""

RULE, BARE = "error_feedback(", "compressed_mean("
"""The same for methods that are expressions, as ``error_feedback(top_k(0.01)) | sgd(0.3)``."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far a method is below the uncompressed one, in the unit of the accuracy.

    Attributes:
      method: its name.
      accuracy: the mean over the seeds of its last accuracy.
      deviation: the standard deviation over the seeds; None for a single one.
      gap: the mean of the uncompressed one minus this mean; None if there is none to compare with.
      error: the standard error of the gap; None if some method has a single seed.
      without: the same method without error feedback, if it was run.
    """

    method: str
    accuracy: float
    deviation: float | None
    gap: float | None
    error: float | None
    without: Gap | None = None

    @property
    def conclusion(self) -> str:
        """One sentence about the gap."""
        if self.gap is None:
            return ""
        if self.error is None:
            return "one seed: no spread is known"
        here = "within two standard errors of the uncompressed run"
        near = self.gap <= 2 * self.error
        if self.without is None or self.without.gap is None:
            return here if near else "below the uncompressed run"
        if self.without.error is None:
            return "one seed without error feedback: no spread is known"
        if self.without.gap <= 2 * self.without.error:
            return f"{here}; without error feedback too" if near else "below the uncompressed run"
        if near:
            return f"gap closed: {here}"
        closed = 1 - self.gap / self.without.gap
        return f"{closed:.0%} of the gap closed" if closed > 0 else "gap not closed"


def gaps(methods: Sequence[Method], dense: str | None = None) -> list[Gap]:
    """A gap for each method that has an accuracy, in their order.

    Args:
      methods: what was run.
      dense: the name of the uncompressed one; None for the one that sends as many bytes as there
        are in the gradient.
    """
    accuracies = {m.name: m.last(QUANTITY) for m in methods}
    reference = accuracies.get(dense or uncompressed(methods) or "", [])
    found = {
        m.name: _gap(m.name, accuracies[m.name], reference) for m in methods if accuracies[m.name]
    }
    return [
        dataclasses.replace(gap, without=found.get(_without(name))) for name, gap in found.items()
    ]


def uncompressed(methods: Sequence[Method]) -> str | None:
    """The first method whose messages are not smaller than the gradient."""
    for method in methods:
        sent, whole = method.message_bytes, method.dense_bytes
        if sent is not None and whole is not None and sent >= whole:
            return method.name
    return None


def _without(name: str) -> str:
    folder, colon, method = name.rpartition(": ")
    if method.startswith(MEMORY):
        return f"{folder}{colon}{method.removeprefix(MEMORY)}"
    return f"{folder}{colon}{method.replace(RULE, BARE)}" if RULE in method else ""


def _gap(name: str, values: list[float], reference: list[float]) -> Gap:
    mean, deviation = statistics.fmean(values), _deviation(values)
    if not reference:
        return Gap(name, mean, deviation, None, None)
    other, error = _deviation(reference), None
    if deviation is not None and other is not None:
        error = math.sqrt(deviation**2 / len(values) + other**2 / len(reference))
    return Gap(name, mean, deviation, statistics.fmean(reference) - mean, error)


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
