"""How much of the residual is sent, and how much is kept, as schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from ef_optax.extend import Array, AxisName, arguments, check, residuals, trees


@dataclasses.dataclass(frozen=True)
class OfNorm:
    """A parameter as a function of the measured gradient norm.

    Attributes:
      function: from the norm of the last emitted update, relative to the largest one so far, to the
        parameter. The norm is 1 in the first step and falls while training converges; it is the
        same on all workers and costs no communication.

    Example:
      Strong compensation while gradients are large, weak when they are small:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> strength = ef.policies.OfNorm(lambda norm: jnp.clip(2 * norm, 0.2, 1.0))
      >>> tx = ef.policies.steer_residual(ef.error_feedback(ef.top_k(0.1)), injection=strength)
    """

    function: Callable[[Array], Any]


Schedule = optax.ScalarOrSchedule | OfNorm
"""A number, a schedule of the step, or a function of the measured norm."""


def steer_residual(
    rule: optax.GradientTransformation,
    *,
    injection: Schedule = 1.0,
    retention: Schedule = 1.0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Injection and retention of a rule's residual, as numbers or schedules.

    .. math:: c = C(g + a_t e), \qquad e' = b_t\,(g + e - c)

    The injection a_t is how much of the residual takes part in what is compressed; whatever it is,
    nothing is lost. The retention b_t is the part that is kept; the rest is dropped at every step,
    and counted in ``state.dropped``. A residual that decays stays bounded even if the compressor is
    too strong, and forgets stale gradients.

    Args:
      rule: a rule with a residual, or a chain with one such rule.
      injection: a_t: a number, a schedule of the step, or an :class:`OfNorm`.
      retention: b_t in [0, 1], likewise.
      axis_name: the rule's worker axis, for a residual that is stored with random rounding.

    Returns:
      The transformation; its state is a :class:`ResidualPolicyState` around the rule's.

    Raises:
      ValueError: for a number out of range, or at init for a rule without a residual.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> late = optax.linear_schedule(0.0, 1.0, 2)  # nothing is injected at first
      >>> tx = ef.policies.steer_residual(ef.error_feedback(ef.top_k(k=1)), injection=late)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array([3.0, 2.0]), state)
      ...     print(updates.tolist(), state.rule.residual.tolist())
      [3.0, 0.0] [0.0, 2.0]
      [3.0, 0.0] [0.0, 4.0]
      [0.0, 6.0] [3.0, 0.0]

    References:
      The two factors of Wu et al., ECQ-SGD, 2018, and of the decaying residuals of DeMo (Peng,
      Quesnelle, Kingma, 2024), kept apart.
    """
    if not callable(injection) and not isinstance(injection, OfNorm):
        check.finite("steer_residual", "injection", injection)
    if not callable(retention) and not isinstance(retention, OfNorm):
        check.share("steer_residual", "retention", retention)

    def begin(params: Any) -> tuple[Array, Array]:
        dtype = trees.widest(params)
        return jnp.ones((), dtype), jnp.zeros((), dtype)  # relative to the largest, the largest

    def value(schedule: Schedule, step: residuals.Step) -> Any:
        if isinstance(schedule, OfNorm):
            return schedule.function(step.extra[0])
        return arguments.value_at(schedule, step.number)

    def before(old: Any, step: residuals.Step) -> Any:
        return trees.scale(value(injection, step), old)

    def after(new: Any, old: Any, step: residuals.Step) -> tuple[Any, Any, Any]:
        whole = trees.axpy(1 - value(injection, step), old, new)
        norm = jnp.sqrt(trees.squared_norm(trees.wide(step.emitted))).astype(step.extra[1].dtype)
        largest = jnp.maximum(norm, step.extra[1])
        kept = trees.scale(value(retention, step), whole)
        return whole, kept, (jnp.where(largest > 0, norm / largest, 1), largest)

    return residuals.around(
        "steer_residual", rule, before=before, after=after, begin=begin, axis_name=axis_name
    )
