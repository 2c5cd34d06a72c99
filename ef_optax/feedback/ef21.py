"""EF21 (Richtarik, Sokolov, Fatkhullin 2021): compress the difference to an estimate.

c_i = C(grad f_i(x) - g_i)      what this worker sends
g_i = g_i + c_i                 the estimate of its gradient, the same on sender and receivers
g   = g + mean_i c_i            emit g
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    check,
    difference,
    exchange_for,
    memory_for,
    trees,
)


class EF21State(NamedTuple):
    """State of :func:`ef21`."""

    estimate: Any  # per worker, like the parameters: g_i, the receivers' copy of its gradient
    mean: Any  # like the parameters: g, the mean of the estimates
    exchange: ExchangeState


def ef21(
    compressor: Compressor,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21: the compressed differences add up to an estimate of every worker's gradient.

    .. math:: c_i = C(\nabla f_i(x) - g_i), \quad g_i' = g_i + c_i,
              \quad \text{emit}\ g' = g + \text{mean}_i\, c_i

    Unlike :func:`error_feedback`, it converges at a constant step if heterogeneous workers have
    exact gradients. With small batches the noise stays; :func:`ef21_momentum` averages it. Step
    sizes: :func:`ef_optax.theory.ef21_step`. With the identity it is gradient descent.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates. ``"compressed"`` is C of the first gradient (the paper);
        ``"full"`` is the gradient itself, sent dense once (the authors' code); ``"zero"`` is zero,
        so that the first update is zero and only one number travels, which shows whether all
        gradients are finite.
      memory: how the estimates are stored, as in :func:`error_feedback`; None is float32. Rounding
        lets the stored mean drift away from the mean of the stored estimates, which no later step
        corrects. Two bytes a value are safe; 8 bits are coarse, and with 4 bits it may diverge.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EF21State`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an unknown ``init`` or a
        compressor that is not additive; at init, for a compressor that makes the memory of a leaf
        grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21(ef.top_k(k=1))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([3.0, 2.0]), tx.init(params), params)
      >>> updates.tolist()
      [3.0, 0.0]
      >>> tx.update(jnp.array([3.0, 2.0]), state, params)[0].tolist()
      [3.0, 2.0]

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21: A new, simpler, theoretically better, and practically
      faster error feedback", NeurIPS 2021.
    """
    check.word("ef21", "init", init, difference.INITS)
    exchange = exchange_for("ef21", compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    estimates = difference.Estimates(exchange, memory_for(memory, axis_name), init)

    def init_fn(params: Any) -> EF21State:
        return EF21State(*estimates.begin(params))

    def update_fn(
        updates: Any, state: EF21State, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21State]:
        del params, extra_args
        _, g, kept = estimates.follow(trees.wide(updates), *state)
        return trees.emit(g, updates), EF21State(*kept)

    return as_transformation(init_fn, update_fn)
