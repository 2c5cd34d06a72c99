"""A residual in the units of scaled gradients, when the loss scale changes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from ef_optax.extend import Array, AxisName, residuals, trees


def rescale_residual(
    rule: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the residual by the change of the loss scale before every step of a rule.

    .. math:: e \leftarrow \frac{s_t}{s_{t-1}}\,e, \qquad p = g + e

    With a dynamic loss scale s, the gradients and the residual of earlier ones must have the same
    scale. It is simpler to divide the gradients by s *before* the rule, which then needs no
    rescaling; this policy is for rules that must see scaled gradients, such as casts to float16.
    Powers of two change no bit. The policy refuses rules with further memories, such as momenta.

    Args:
      rule: a rule that remembers only a residual, or a chain with one such rule.
      axis_name: the rule's worker axis, for a residual that is stored with random rounding.

    Returns:
      The transformation; its update needs the argument ``loss_scale``, a positive number. Give the
      lift an example, ``extra_args={"loss_scale": 1.0}``.

    Raises:
      ValueError: at init for a rule without a residual or with other memories, and at update
        without ``loss_scale``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.policies.rescale_residual(ef.error_feedback(ef.top_k(k=1)))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([3.0, 2.0]), state, loss_scale=1.0)
      >>> tx.update(jnp.array([6.0, 4.0]), state, loss_scale=2.0)[0].tolist()  # 4 + 2 * 2
      [0.0, 8.0]
    """

    def begin(params: Any) -> Array:
        return jnp.zeros((), trees.widest(params))

    def scale(step: residuals.Step) -> Array:
        if "loss_scale" not in step.extra_args:
            raise ValueError(
                "rescale_residual: update needs loss_scale=, the factor of this step's loss: "
                "update(grads, state, params, loss_scale=scale)."
            )
        return jnp.asarray(step.extra_args["loss_scale"], step.extra.dtype)

    def before(old: Any, step: residuals.Step) -> Any:
        last = step.extra
        return trees.scale(jnp.where(last > 0, scale(step) / jnp.where(last > 0, last, 1), 1), old)

    def after(new: Any, old: Any, step: residuals.Step) -> tuple[Any, Any, Any]:
        del old
        return new, new, scale(step)

    return residuals.around(
        "rescale_residual",
        rule,
        before=before,
        after=after,
        begin=begin,
        axis_name=axis_name,
        alone=True,
    )
