"""A limit for the residual, against outliers and stale mass."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import AxisName, check, collectives, residuals, trees

By = Literal["largest", "rms", "value", "norm"]
Across = Literal["mean", "largest"] | None


def clip_residual(
    rule: optax.GradientTransformation,
    limit: float = 10.0,
    *,
    by: By = "largest",
    across: Across = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the residual after every step of a rule, and counts what this drops.

    .. math:: e_i \leftarrow \text{clip}(e_i, \pm k s), \qquad s = \max_j |g_{ij}|
              \ \text{of the leaf, or its RMS, or 1}

    With error feedback, what was sent and the residual together are the sum of all gradients.
    Clipping breaks this by exactly the mass that it drops: ``state.dropped`` has its
    1-norm for each leaf and worker. More than 1% of the gradients' mass means that the compression
    is too strong or the limit too low. In a step in which a leaf's gradient is zero, its residual
    is not clipped by a multiple of it.

    Args:
      rule: a rule with a residual (:func:`error_feedback`, :func:`dgc`, :func:`econtrol`, ...), or
        a chain with one such rule.
      limit: k, positive.
      by: ``"largest"`` and ``"rms"`` clip values at k times the largest magnitude, or the RMS, of
        this worker's gradient of the leaf in this step; ``"value"`` clips values at k; ``"norm"``
        scales the residual of a leaf so that its 2-norm is at most k.
      across: with ``"largest"`` or ``"rms"``, one limit for all workers: k times the mean, or the
        largest, of the workers' s. Then no worker forgets more than others because its gradients
        are small. It costs a sum or a maximum of one number for each leaf. None: each has its own.
      axis_name: the rule's worker axis, for a residual that is stored with random rounding and for
        ``across``.

    Returns:
      The transformation; its state is a :class:`ResidualPolicyState` around the rule's.

    Raises:
      ValueError: for a limit that is not positive, an unknown ``by`` or ``across``, for ``across``
        with a ``by`` that all workers share already, or at init for a rule without a residual.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.policies.clip_residual(ef.error_feedback(ef.top_k(k=1)), 0.5)
      >>> _, state = tx.update(jnp.array([4.0, 3.0, 1.0]), tx.init(jnp.zeros(3)))
      >>> state.rule.residual.tolist(), state.dropped.item()  # at most 0.5 * 4
      ([0.0, 2.0, 1.0], 1.0)

    References:
      Derived from section 12 of the definitions: no publication clips e itself (DGC clips
      gradients, Clip21 differences).
    """
    check.positive("clip_residual", "limit", limit)
    check.word("clip_residual", "by", by, ("largest", "rms", "value", "norm"))

    if across is not None:
        check.word("clip_residual", "across", across, ("mean", "largest"))
        if by in ("value", "norm"):
            raise ValueError(
                f"clip_residual: across={across!r} needs by='largest' or by='rms'; the limit of "
                f"by={by!r} is the same on all workers already."
            )

    def scale_of(e: Any, g: Any) -> Any:
        if by in ("value", "norm") or not e.size:
            return jnp.zeros((), e.dtype)
        g = g.astype(e.dtype)
        return jnp.max(jnp.abs(g)) if by == "largest" else jnp.sqrt(jnp.mean(g * g))

    def one(e: Any, scale: Any) -> Any:
        bound = jnp.asarray(limit, e.dtype)
        if by == "norm":
            norm = jnp.sqrt(trees.squared_norm(e))
            return jnp.where(norm > bound, e * (bound / norm), e)
        if by != "value":
            bound = jnp.where(scale > 0, bound * scale, jnp.inf)
        return jnp.clip(e, -bound, bound)

    def after(new: Any, old: Any, step: residuals.Step) -> tuple[Any, Any, Any]:
        del old
        scales = jax.tree.map(scale_of, new, step.updates)
        if across == "largest":
            scales = jax.tree.map(lambda s: collectives.pmax(s, axis_name), scales)
        elif across == "mean":
            workers = collectives.axis_size(axis_name)
            scales = jax.tree.map(lambda s: collectives.psum(s, axis_name) / workers, scales)
        return new, jax.tree.map(one, new, scales), ()

    return residuals.around("clip_residual", rule, after=after, axis_name=axis_name)
