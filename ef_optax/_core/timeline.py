"""When a codec changes: at steps that are known beforehand and may repeat for ever."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The steps at which something changes.

    Attributes:
      changes: the steps, increasing, from 1 up to ``settled + period``.
      settled: the step from which on everything repeats with the period.
      period: the length of a period; 1 if nothing changes from ``settled`` on. The changes after
        ``settled`` come again ``period`` steps later, and so on.
    """

    changes: tuple[int, ...] = ()
    settled: int = 0
    period: int = 1

    def between(self, start: int, end: int) -> Iterator[int]:
        """The changes at steps after ``start`` and before ``end``."""
        for first in self.changes:
            repeats = first > self.settled and self.period > 1
            for step in range(first, end, self.period) if repeats else (first,):
                if start < step < end:
                    yield step

    def starts(self) -> tuple[int, ...]:
        """The first steps of all segments, up to the end of the first period."""
        return 0, *sorted({*self.between(0, self.settled + self.period)})

    def number(self, step: int) -> int:
        """The index in :meth:`starts` of the segment that contains a step."""
        if step >= self.settled:
            step = self.settled + (step - self.settled) % self.period
        return sum(step >= start for start in self.starts()[1:])

    def segment(self, step: jax.Array) -> jax.Array:
        """:meth:`number` for a traced step."""
        wrapped = self.settled + (step - self.settled) % self.period
        step = jnp.where(step < self.settled, step, wrapped)
        later = jnp.asarray(self.starts()[1:], jnp.int32)
        return jnp.sum(step >= later, dtype=jnp.int32)


def merged(timelines: Sequence[Timeline]) -> Timeline:
    """The timeline of several codecs that change independently.

    >>> merged([Timeline((5,), 5), Timeline((1, 2), 0, 2)]).starts()
    (0, 1, 2, 3, 4, 5, 6)
    """
    settled = max((line.settled for line in timelines), default=0)
    period = math.lcm(*(line.period for line in timelines))
    last = settled + period + 1
    return Timeline(
        tuple(sorted({step for line in timelines for step in line.between(0, last)})),
        settled,
        period,
    )
