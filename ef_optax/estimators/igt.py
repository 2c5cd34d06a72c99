"""Implicit gradient transport: a moving average of gradients at extrapolated points."""

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


class IGTState(NamedTuple):
    """State of :func:`igt`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    reach: Array  # float32 scalar: (1 - eta)/eta of the next step
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """A point ahead of the parameters, along the last step."""
        return {"igt": trees.axpy(self.reach, trees.sub(params, self.last), params)}


def igt(
    fresh_weight: optax.ScalarOrSchedule, *, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""Implicit gradient transport: gradients at points ahead, whose average is up to date.

    .. math:: v' = (1 - \eta) v + \eta\,\nabla f_i\left(x + \tfrac{1 - \eta}{\eta}
              (x - x^{\text{last}}); \xi\right)

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.
      memory: the dtype in which the estimate is stored, as in :func:`ef_optax.ef21`.

    Returns:
      The transformation; its state is an :class:`IGTState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      ValueError: for a weight outside (0, 1], and at update if parameters or gradients are missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> state = igt(0.25).init(jnp.zeros(1))._replace(reach=jnp.float32(3))
      >>> ef.query_points(state, jnp.ones(1))["igt"].tolist()
      [4.0]

    References:
      Cutkosky, Mehta, "Momentum Improves Normalized SGD", ICML 2020; with EF21: Sadiev et al.,
      2025.
    """
    check.weight("igt", "fresh_weight", fresh_weight, schedule=True)
    memory = memory_for(memory)

    def reach(steps: Array, dtype: Any) -> Array:
        """The factor of the next step's query; it is 0 before the first step."""
        eta = jnp.asarray(arguments.value_at(fresh_weight, steps), dtype)
        return (1 - eta) / eta

    def init_fn(params: Any) -> IGTState:
        steps, still = jnp.zeros((), jnp.int32), jnp.zeros((), trees.widest(params))
        return IGTState(memory.zeros(params), trees.copy(params), still, steps)

    def update_fn(
        updates: Any, state: IGTState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, IGTState]:
        params = arguments.require_params("igt", params)
        ahead = trees.wide(arguments.gradient_at("igt", "igt", extra_args))
        v = moving_average(fresh_weight, state.steps, memory.read(state.estimate), ahead)
        steps = state.steps + 1
        kept = memory.write(v, state.estimate, state.steps)
        return trees.emit(v, updates), IGTState(
            kept, params, reach(steps, trees.widest(params)), steps
        )

    return as_transformation(init_fn, update_fn)
