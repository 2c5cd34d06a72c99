"""Dual averaging (Nesterov 2009; Xiao 2010): every step is taken from the start, for f + psi.

z = z + a_t g_t ;  A = A + a_t ;  x = argmin_x  <z, x> + A psi(x) + (gamma_t / 2) ||x - x_0||^2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import Array, arguments, as_transformation, check, trees


class DualAveragingState(NamedTuple):
    """State of :func:`dual_averaging`."""

    start: Any  # like the parameters: x_0
    total: Any  # like the parameters: z, the weighted sum of all gradients
    weight: Array  # scalar: A, the sum of the weights
    steps: Array  # int32 scalar


def dual_averaging(
    learning_rate: optax.ScalarOrSchedule,
    prox: Callable[[Any, Any], Any] | None = None,
    *,
    step_weight: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Dual averaging: the model is the start, moved by the sum of all gradients.

    .. math:: z' = z + a_t g_t, \quad A' = A + a_t, \quad x' = \operatorname*{argmin}_x\;
              \langle z', x\rangle + A' \psi(x) + \tfrac{\gamma_t}{2}\|x - x_0\|^2
              = \text{prox}_{A'\psi/\gamma_t}\!\left(x_0 - z'/\gamma_t\right)

    A proximal step forgets what the regulariser has cut away; here it stays in the sum. Without
    psi, with constant weights and a constant rate, this is SGD. It must be last in a chain, because
    nothing after it may change the step.

    Args:
      learning_rate: 1/gamma_t, at least 0: a number or a schedule of the steps.
      prox: ``prox(params, step)``, the proximal operator of ``step * psi``, for example
        :func:`ef_optax.l1_prox`; None for psi = 0.
      step_weight: a_t, at least 0: a number or a schedule of the steps.

    Returns:
      The optimizer; its state is a :class:`DualAveragingState` of twice the size of the parameters.

    Raises:
      ValueError: for a negative rate or weight, and at update without parameters.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.recipes.dual_averaging(0.5, ef.l1_prox(1.0))
      >>> x, seen = jnp.zeros(1), []
      >>> state = tx.init(x)
      >>> for _ in range(3):  # the sums -3, -6, -9 against the sums 1, 2, 3 of the L1 term
      ...     updates, state = tx.update(jnp.array([-3.0]), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     seen.append(float(x[0]))
      >>> seen
      [1.0, 2.0, 3.0]

    References:
      Nesterov, "Primal-dual subgradient methods for convex problems", 2009. Xiao, "Dual averaging
      methods for regularized stochastic learning and online optimization", 2010.
    """
    check.rate("dual_averaging", "learning_rate", learning_rate)
    check.rate("dual_averaging", "step_weight", step_weight)

    def init_fn(params: Any) -> DualAveragingState:
        start = trees.wide(trees.copy(params))  # the caller may donate the parameters
        weight, steps = jnp.zeros((), trees.widest(params)), jnp.zeros((), jnp.int32)
        return DualAveragingState(start, optax.tree.zeros_like(start), weight, steps)

    def update_fn(
        updates: Any, state: DualAveragingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DualAveragingState]:
        del extra_args
        params = arguments.require_params("dual_averaging", params)
        rate = arguments.value_at(learning_rate, state.steps)
        a = arguments.value_at(step_weight, state.steps)
        z = trees.axpy(a, updates, state.total)
        weight = state.weight + jnp.asarray(a, state.weight.dtype)
        x = trees.axpy(-rate, z, state.start)
        if prox is not None:
            x = prox(x, rate * weight)
        step = trees.emit(trees.sub(x, params), updates)
        return step, DualAveragingState(state.start, z, weight, state.steps + 1)

    return as_transformation(init_fn, update_fn)
