"""STORM (MVR): a moving average that the difference of two minibatch gradients corrects."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    memory_for,
    moving_average,
    trees,
)


class StormState(NamedTuple):
    """State of :func:`storm`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """The last iterate, at which gradients are needed besides the parameters."""
        del params
        return {"storm": self.last}


def storm(
    fresh_weight: optax.ScalarOrSchedule, *, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""STORM (momentum-based variance reduction): an average that is corrected for each step.

    .. math:: v' = (1 - \eta)\,(v + \nabla f_i(x; \xi) - \nabla f_i(x^{\text{last}}; \xi))
              + \eta\,\nabla f_i(x; \xi)

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.
      memory: the dtype in which the estimate is stored, as in :func:`ef_optax.ef21`.

    Returns:
      The transformation; its state is a :class:`StormState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      ValueError: for a weight outside (0, 1], and at update if parameters or gradients are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = storm(0.5)
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> grads = {"params": jnp.array([4.0]), "storm": jnp.array([2.0])}
      >>> _, state = tx.update(grads["params"], state, params, grads=grads)
      >>> tx.update(grads["params"], state, params, grads=grads)[0].tolist()  # (4 + 2)/2 + 4/2
      [5.0]

    References:
      Cutkosky, Orabona, "Momentum-Based Variance Reduction in Non-Convex SGD", NeurIPS 2019; with
      EF21: Fatkhullin, Tyurin, Richtarik, 2023, and Sadiev et al., 2025.
    """
    check.weight("storm", "fresh_weight", fresh_weight, schedule=True)
    memory = memory_for(memory)

    def init_fn(params: Any) -> StormState:
        return StormState(memory.zeros(params), trees.copy(params), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: StormState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StormState]:
        params = arguments.require_params("storm", params)
        now = trees.wide(updates)
        before = arguments.gradient_at("storm", "storm", extra_args)
        moved = trees.add(memory.read(state.estimate), trees.sub(now, before))
        v = moving_average(fresh_weight, state.steps, moved, now)
        kept = memory.write(v, state.estimate, state.steps)
        return trees.emit(v, updates), StormState(kept, params, state.steps + 1)

    return as_transformation(init_fn, update_fn)
