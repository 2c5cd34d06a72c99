"""Workers that are absent from a step: they add nothing to it, and their memories wait.

It works for every rule, because the exchange leaves absent workers out of its means, and because
what a rule remembers of a worker is in the leaves of its state that have a worker axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array
from ef_optax.parallel.change_workers import SHARDS, roles_of
from ef_optax.parallel.worker_map import Layout


def check_present(present: Any, num_workers: int) -> Any:
    """Which workers take part, as booleans.

    Raises:
      ValueError: unless it is one number or boolean for each worker.
    """
    mask = present.value if hasattr(present, "value") else present
    if jnp.shape(mask) != (num_workers,):
        raise ValueError(
            f"present has shape {jnp.shape(mask)}, but must be ({num_workers},): for each worker "
            "whether it takes part in this step."
        )
    return jnp.asarray(mask).astype(bool)


def silenced(present: Array, tree: Any) -> Any:
    """Zeros in place of an absent worker's arrays, which may hold anything."""

    def one(x: Any) -> Any:
        return jnp.where(present, x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def waiting(present: Array, layouts: Any, after: Any, before: Any) -> Any:
    """The next state of one worker, in which an absent worker's own leaves are as they were.

    Shards are not the worker's own: it holds them for all workers, and goes on to serve them.

    Args:
      present: whether this worker takes part.
      layouts: which leaves differ between the workers.
      after: the state after the step.
      before: the state before it.
    """

    def one(layout: Layout, role: str, new: Any, old: Any) -> Any:
        own = layout.stacked and role != SHARDS
        return jnp.where(present, new, old) if own else new

    return jax.tree.map(one, layouts, roles_of(before), after, before)
