"""A ratio, a rank or a number of bits that changes over time, in a few compiled levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ef_optax.compressors.combine.scheduled import scheduled
from ef_optax.extend import Compressor, check

DGC_RATIOS = (0.25, 0.0625, 0.015625, 0.004, 0.001)
"""The kept ratios of DGC's paper in its four epochs of warm-up, and after it."""


def gradual(
    make: Callable[[Any], Compressor],
    schedule: Callable[[int], Any],
    steps: int,
    *,
    levels: int = 5,
    whole: bool = False,
) -> Compressor:
    """A compressor whose ratio, rank or width follows a schedule, in a few levels.

    The steps are divided into ``levels`` equal parts. In each of them the parameter is constant:
    the schedule's value in the middle of the part; afterwards it is the value at ``steps``. Every
    distinct value is one exchange in the compiled program, so there should be few.

    Args:
      make: a function from the parameter to a compressor, such as ``ef.top_k`` or
        ``ef.power_sgd``.
      schedule: a function from the step to the parameter, such as an Optax schedule.
      steps: exchanges after which nothing changes, at least 1.
      levels: number of parts, at least 1 and at most ``steps``.
      whole: whether to round the parameter to a whole number, as for a rank or for bits.

    Returns:
      The compressor.

    Raises:
      ValueError: if a count is out of range, or if the schedule gives what ``make`` refuses.

    Example:
      The rank falls from 8 to 2; a ratio as in DGC's warm-up is :func:`dgc_warmup`.

      >>> import ef_optax as ef, optax
      >>> rank = optax.linear_schedule(8, 2, 300)
      >>> falling = ef.policies.gradual(ef.power_sgd, rank, 300, levels=3, whole=True)
      >>> [falling.codec.at(step).rank for step in (0, 100, 200, 300)]
      [7, 5, 3, 2]
    """
    check.count("gradual", "steps", steps)
    check.count("gradual", "levels", levels, most=steps)
    check.flag("gradual", "whole", whole)
    starts = [steps * level // levels for level in range(levels + 1)]
    middles = [(a + b) // 2 for a, b in zip(starts, starts[1:], strict=False)]
    with jax.ensure_compile_time_eval():  # a user may make an optimizer while a program is traced
        values = [float(np.asarray(schedule(step))) for step in (*middles, steps)]
    if whole:
        values = [round(value) for value in values]
    changed = [i for i in range(1, levels + 1) if values[i] != values[i - 1]]
    return scheduled([starts[i] for i in changed], [make(values[i]) for i in (0, *changed)])
