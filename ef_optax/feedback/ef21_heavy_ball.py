"""EF21-HB (Fatkhullin et al. 2021): heavy-ball momentum on EF21's mean estimate."""

from __future__ import annotations

import optax

from ef_optax.extend import (
    AxisName,
    Compressor,
    MemoryLike,
    check,
    difference,
)
from ef_optax.feedback.ef21 import ef21


def ef21_heavy_ball(
    compressor: Compressor,
    decay: float,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-HB: ``chain(ef21(compressor), optax.trace(decay))``, momentum after the aggregation.

    .. math:: v' = \eta v + g', \quad \text{emit}\ v'

    Here g' comes from :func:`ef21`. The momentum is the same on all workers and costs no
    communication.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      decay: eta in [0, 1), the weight of the *old* momentum; 0 is EF21.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a decay outside [0, 1), an
        unknown ``init`` or a compressor that is not additive.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_heavy_ball(ef.identity(), 0.5)
      >>> params = jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([2.0]), tx.init(params), params)
      >>> tx.update(jnp.array([2.0]), state, params)[0].tolist()
      [3.0]

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021.
    """
    check.decay("ef21_heavy_ball", "decay", decay)
    check.word("ef21_heavy_ball", "init", init, difference.INITS)
    inner = ef21(compressor, axis_name=axis_name, init=init, memory=memory)
    return optax.with_extra_args_support(optax.chain(inner, optax.trace(decay)))
