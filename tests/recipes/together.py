"""Several optimizers in one compiled program, each on its own copy of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ef_optax as ef
from tests.feedback.problem import AXIS


def trajectories(
    optimizers: Mapping[str, optax.GradientTransformation], workers: int, start: Any, gradients: Any
) -> dict[str, tuple[Any, Any, Any]]:
    """By name: the first state, then the parameters and the states after every round.

    Args:
      optimizers: what is run, by name.
      workers: number of simulated workers.
      start: float64 parameters, by leaf.
      gradients: for each leaf those of all rounds and workers, (rounds, workers, *shape).
    """
    with jax.enable_x64(True):
        lifted = {name: ef.simulate(tx, workers, AXIS) for name, tx in optimizers.items()}
        x0 = jax.tree.map(jnp.asarray, start)

        def step(carry: Any, grads: Any) -> Any:
            after = {}
            for name, (x, state) in carry.items():
                updates, state = lifted[name].update(grads, state, x)
                after[name] = optax.apply_updates(x, updates), state
            return after, after

        first = {name: (x0, tx.init(x0)) for name, tx in lifted.items()}
        grads = jax.tree.map(jnp.asarray, gradients)
        seen = jax.jit(lambda c, g: jax.lax.scan(step, c, g)[1])(first, grads)
        seen, first = jax.device_get((seen, first))
    return {name: (first[name][1], *seen[name]) for name in optimizers}
