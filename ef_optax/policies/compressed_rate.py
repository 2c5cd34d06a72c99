"""A learning rate that follows compression when it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from ef_optax.extend import arguments, check


def compressed_rate(
    learning_rate: optax.ScalarOrSchedule, start: int, factor: float, *, ramp: int = 0
) -> Callable[[Any], Any]:
    """A learning rate that is multiplied by a factor from the step on at which compression begins.

    Give the same schedule to the optimizer and, as ``learning_rate=``, to
    :func:`ef_optax.error_feedback`: its corrected form rescales the residual whenever the rate
    changes, so that the change at ``start`` (and every later one) is applied to the residual too.

    Args:
      learning_rate: a number or an Optax schedule.
      start: the step at which compression begins, at least 0.
      factor: from :func:`ef_optax.theory.rate_factor`, or a chosen one; positive.
      ramp: steps over which the rate moves linearly to its new value; 0 at once.

    Returns:
      The schedule.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import ef_optax as ef
      >>> rate = ef.policies.compressed_rate(0.5, 100, ef.theory.rate_factor(0.75))
      >>> [float(rate(step)) for step in (0, 99, 100)]
      [0.5, 0.5, 0.25]
    """
    check.rate("compressed_rate", "learning_rate", learning_rate)
    check.count("compressed_rate", "start", start, least=0)
    check.positive("compressed_rate", "factor", factor)
    check.count("compressed_rate", "ramp", ramp, least=0)

    def schedule(step: Any) -> Any:
        done = jnp.asarray(step - start + 1, float) / max(1, ramp)
        share = jnp.clip(done, 0.0, 1.0)
        return arguments.value_at(learning_rate, step) * (1.0 + (factor - 1.0) * share)

    return schedule
