"""What the estimators share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import Array
from ef_optax._rules import arguments


def _average(fresh_weight: optax.ScalarOrSchedule, steps: Array, moved: Any, fresh: Any) -> Any:
    """``(1 - eta) moved + eta fresh``; the first average is the fresh value."""
    eta = jnp.asarray(arguments.value_at(fresh_weight, steps))
    eta = jnp.where(steps == 0, jnp.ones_like(eta), eta)
    return trees.add(trees.scale(1 - eta, moved), trees.scale(eta, fresh))


def _copy(params: Any) -> Any:
    """A copy: the caller may donate the parameters and the state together."""
    return jax.tree.map(jnp.array, params)
