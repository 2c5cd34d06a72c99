"""LoCo (Xie et al. 2024): a sharded optimizer whose gradients travel in 4 bits, with feedback.

h = g + e ;  q = Q4(h) ;  e = b e + (1 - b) (h - q), stored in 8 bits, 0 every 1024 steps

With r = e/(1 - b) this is h = g + (1 - b) r and r = r + g - q: error feedback with the injection
1 - b, which loses nothing between two resets.
"""

from __future__ import annotations

import optax

from ef_optax.compressors.quantize.block_quantize import block_quantize
from ef_optax.extend import AxisName, Compressor, MemoryLike, check
from ef_optax.feedback.sharded_optimizer import sharded_optimizer
from ef_optax.policies.reset_residual import reset_residual


def loco(
    inner: optax.GradientTransformation,
    *,
    beta: float = 0.8,
    reset_every: int = 1024,
    gradients: Compressor | None = None,
    weights: Compressor | None = None,
    memory: MemoryLike = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoCo: gradients are reduced and scattered in 4 bits, around any optimizer by entries.

    .. math:: h = g + e, \quad q = Q_4(h), \quad e' = \beta e + (1 - \beta)(h - q)

    Args:
      inner: the optimizer with its rate and sign, which works on shards, such as
        ``optax.adamw(3e-4)``.
      beta: b in [0, 1); with 0 it is plain error feedback.
      reset_every: steps between two resets of e, at least 1.
      gradients: Q, by default ``block_quantize(4, block=128)``.
      weights: how the new weights are sent, as in :func:`ef_optax.sharded_optimizer`:
        ``block_quantize(4, block=2048)`` sends their differences as SDP4Bit does; None sends
        float32.
      memory: how e is stored, by default in 8 bits with a scale for each 128 values.
      axis_name: the worker axis (or a tuple of axes); None for one worker.

    Returns:
      The optimizer. Memory of a device: the weights, 1.03 bytes of e a parameter, and an n-th of
      the optimizer's state and of the float32 weights. Bits of a message: 4.25 d for the gradients.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation or a compressor is not a Compressor.
        ValueError: for an option out of range; at init, for split parameters.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp, optax
      >>> tx = ef.recipes.loco(optax.sgd(1.0), gradients=ef.top_k(k=1))
      >>> params = jnp.zeros(2)
      >>> updates, state = jax.jit(tx.update)(jnp.array([3.0, 1.0]), tx.init(params), params)
      >>> updates.tolist()
      [-3.0, 0.0]

    References:
      Xie et al., "LoCo: Low-Bit Communication Adaptor for Large-scale Model Training", 2024, and
      its code in DeepSpeed, csrc/quantization/swizzled_quantize.cu, where the second hop between
      machines has a residual of its own.
    """
    check.decay("loco", "beta", beta)
    tx = sharded_optimizer(
        inner,
        block_quantize(4, block=128) if gradients is None else gradients,
        weights,
        axis_name=axis_name,
        injection=1.0 - beta,
        memory=block_quantize(8, block=128) if memory is None else memory,
    )
    check.count("loco", "reset_every", reset_every)
    return reset_residual(tx, reset_every, axis_name=axis_name)
