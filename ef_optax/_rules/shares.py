"""What differs between the workers by agreement: their shares and their draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ef_optax._exchange import collectives as coll
from ef_optax._numeric.dtypes import Array


def own_share(rule: str, weights: Sequence[float], axis_name: coll.AxisName) -> Array:
    """``n w_i`` of this worker, in JAX's default precision; it travels with its message."""
    n = coll.axis_size(axis_name)
    if len(weights) != n:
        raise ValueError(
            f"{rule}: weights has {len(weights)} numbers, but axis {axis_name!r} has {n} workers; "
            "give one weight for each."
        )
    return jnp.asarray([n * w for w in weights], float)[coll.axis_index(axis_name)]


def draw(key: Array, count: Array, axis_name: coll.AxisName, *, shared: bool = False) -> Array:
    """This step's key; the same on all workers if ``shared``, else each worker's own."""
    key = jax.random.fold_in(key, count)
    return key if shared else jax.random.fold_in(key, coll.axis_index(axis_name))


def check_shares(rule: str, weights: Sequence[float]) -> None:
    """Refuses weights that are not positive or do not sum to 1."""
    total = math.fsum(weights)
    if not all(w > 0 for w in weights) or abs(total - 1) > 1e-6:
        raise ValueError(
            f"{rule}: weights={tuple(weights)!r} must be positive and sum to 1 (they sum to "
            f"{total}); ef_optax.theory.weights(constants) makes them from smoothness constants."
        )
