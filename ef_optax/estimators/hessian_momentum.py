"""Hessian momentum: a moving average that a Hessian-vector product corrects for each step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.estimators.points import HessianVector
from ef_optax.extend import (
    Array,
    MemoryLike,
    arguments,
    as_key,
    as_transformation,
    check,
    memory_for,
    moving_average,
    trees,
)


class HessianMomentumState(NamedTuple):
    """State of :func:`hessian_momentum`."""

    estimate: Any  # per worker, like the parameters: v
    last: Any  # the parameters of the last step
    fraction: Array  # float32 scalar: the Hessian's position on the last step's segment, 1: its end
    steps: Array  # int32 scalar

    def points(self, params: Any) -> dict[str, Any]:
        """The product of the Hessian with the last step."""
        step = trees.sub(params, self.last)
        return {"hessian_momentum": HessianVector(trees.axpy(self.fraction, step, self.last), step)}


def hessian_momentum(
    fresh_weight: optax.ScalarOrSchedule, key: Any = None, *, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""Hessian-corrected momentum: a Hessian-vector product corrects the average for each step.

    .. math:: v' = (1 - \eta)\,(v + \nabla^2 f_i(y; \xi)(x - x^{\text{last}}))
              + \eta\,\nabla f_i(x; \xi)

    Here y = x (HM), or, if a key is given, a uniformly random point of the last step's segment
    (RHM).

    Args:
      fresh_weight: eta in (0, 1], or a schedule of it; 1 is the plain minibatch gradient.
      key: None, or a JAX random key or an int for RHM's point, the same on all workers.
      memory: the dtype in which the estimate is stored, as in :func:`ef_optax.ef21`.

    Returns:
      The transformation; its state is a :class:`HessianMomentumState`. Call
      ``update(grads["params"], state, params, grads=grads)``.

    Raises:
      TypeError: if ``key`` is not a key. ValueError: for a weight outside (0, 1], and at update if
        parameters or gradients are missing.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> state = hessian_momentum(0.5).init(jnp.zeros(1))
      >>> query = ef.query_points(state, jnp.ones(1))["hessian_momentum"]
      >>> query.point.tolist(), query.tangent.tolist()
      ([1.0], [1.0])

    References:
      Sadiev et al., "Improved Convergence in Parameter-Agnostic Error Feedback through Momentum",
      2025; update as in the authors' code.
    """
    check.weight("hessian_momentum", "fresh_weight", fresh_weight, schedule=True)
    key = None if key is None else as_key(key, "hessian_momentum")
    memory = memory_for(memory)

    def fraction(steps: Array) -> Array:
        """The position of the next step's product on its segment."""
        if key is None:
            return jnp.ones((), jnp.float32)
        return jax.random.uniform(jax.random.fold_in(key, steps), dtype=jnp.float32)

    def init_fn(params: Any) -> HessianMomentumState:
        steps = jnp.zeros((), jnp.int32)
        return HessianMomentumState(
            memory.zeros(params), trees.copy(params), fraction(steps), steps
        )

    def update_fn(
        updates: Any, state: HessianMomentumState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, HessianMomentumState]:
        params = arguments.require_params("hessian_momentum", params)
        product = arguments.gradient_at("hessian_momentum", "hessian_momentum", extra_args)
        moved = trees.add(memory.read(state.estimate), product)
        v = moving_average(fresh_weight, state.steps, moved, trees.wide(updates))
        kept, steps = memory.write(v, state.estimate, state.steps), state.steps + 1
        return trees.emit(v, updates), HessianMomentumState(kept, params, fraction(steps), steps)

    return as_transformation(init_fn, update_fn)
