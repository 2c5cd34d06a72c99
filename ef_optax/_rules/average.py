"""Moving averages of gradients, with the weight of the fresh value as their parameter."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import Array
from ef_optax._rules import arguments


def moving_average(fresh_weight: optax.ScalarOrSchedule, steps: Array, old: Any, fresh: Any) -> Any:
    """``(1 - eta) old + eta fresh``; the first average is the fresh value.

    Args:
      fresh_weight: eta, the weight of the fresh value, or a schedule of it.
      steps: averages made so far, an int32 scalar; at 0 eta is 1.
      old: the average so far, which the caller may have corrected for the last step.
      fresh: the value of this step, a tree like ``old``.
    """
    eta = jnp.asarray(arguments.value_at(fresh_weight, steps))
    eta = jnp.where(steps == 0, jnp.ones_like(eta), eta)
    return trees.add(trees.scale(1 - eta, old), trees.scale(eta, fresh))
