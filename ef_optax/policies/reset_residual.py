"""A residual that is dropped now and then."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import AxisName, check, residuals


def reset_residual(
    rule: optax.GradientTransformation, period: int, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Drops the residual after every ``period``-th step of a rule, and counts what this loses.

    Some systems do this, on purpose or when a checkpoint is loaded. :func:`flush` sends the
    residual instead and loses nothing; prefer it.

    Args:
      rule: a rule with a residual, or a chain with one such rule.
      period: steps between two resets, at least 1; with 1 the rule has no memory.
      axis_name: the rule's worker axis, for a residual that is stored with random rounding.

    Returns:
      The transformation; its state is a :class:`ResidualPolicyState` around the rule's.

    Raises:
      ValueError: for a period below 1, or at init for a rule without a residual.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.policies.reset_residual(ef.error_feedback(ef.top_k(k=1)), period=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     _, state = tx.update(jnp.array([3.0, 2.0]), state)
      ...     print(state.rule.residual.tolist(), state.dropped.item())
      [0.0, 2.0] 0.0
      [0.0, 0.0] 3.0

    References:
      The null rounds of the public code of SparseLoCo, templar; DeepSpeed's 1-bit Adam, which
      begins with zero residuals when a checkpoint is loaded.
    """
    check.count("reset_residual", "period", period)

    def after(new: Any, old: Any, step: residuals.Step) -> tuple[Any, Any, Any]:
        del old
        now = (step.number + 1) % period == 0
        return new, jax.tree.map(lambda e: jnp.where(now, 0, e), new), ()

    return residuals.around("reset_residual", rule, after=after, axis_name=axis_name)
