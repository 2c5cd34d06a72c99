"""Clip21 (Khirirat et al. 2023): EF21 whose compressor is clipping.

g_i = g_i + clip_tau(grad f_i(x) - g_i) ;  emit mean_i g_i
"""

from __future__ import annotations

import optax

from ef_optax.compressors.combine.dense import dense
from ef_optax.extend import (
    AxisName,
    MemoryLike,
    check,
)
from ef_optax.feedback.ef21 import ef21


def clip21(
    threshold: float, *, axis_name: AxisName = None, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clip21: clips the *difference* to the estimate, so that clipping leaves no bias.

    .. math:: g_i' = g_i + \min\left(1, \frac{\tau}{\|\nabla f_i(x) - g_i\|}\right)
              (\nabla f_i(x) - g_i), \quad \text{emit mean}_i\,g_i'

    After finitely many steps the differences are shorter than tau, and clipping is inactive. It is
    ``ef21(ef.dense(optax.clip_by_global_norm(tau)))``, so the messages are dense. If parameters are
    split over model axes, the norm is that of one device's slices of the leaves that are split
    alike.

    Args:
      threshold: tau, the largest norm of a worker's difference over all leaves.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an ``EF21State``.

    Raises:
      ValueError: if ``threshold`` is not positive.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.clip21(2.0)
      >>> update = jax.jit(tx.update)
      >>> params, state, seen = jnp.zeros(1), tx.init(jnp.zeros(1)), []
      >>> for _ in range(3):
      ...     updates, state = update(jnp.array([5.0]), state, params)
      ...     seen.append(float(updates[0]))
      >>> seen
      [2.0, 4.0, 5.0]

    References:
      Khirirat, Gorbunov, Horvath, Islamov, Karray, Richtarik, "Clip21: Error Feedback for Gradient
      Clipping", 2023.
    """
    check.positive("clip21", "threshold", threshold)
    return ef21(dense(optax.clip_by_global_norm(threshold)), axis_name=axis_name, memory=memory)
