"""EF21-W (Richtarik, Gasanov, Burlachenko 2024): EF21, weighted by the workers' smoothness.

u_i = C(grad f_i(x)/(n w_i) - g_i)
g_i = g_i + u_i ;  g = g + sum_i w_i u_i ;  emit g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    AxisName,
    Compressor,
    MemoryLike,
    as_transformation,
    check,
    difference,
    exchange_for,
    memory_for,
    shares,
    trees,
)
from ef_optax.feedback.ef21 import EF21State


def ef21_w(
    compressor: Compressor,
    weights: Sequence[float],
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-W: workers with steep objectives get larger weights, which allows a larger step.

    .. math:: u_i = C\left(\frac{\nabla f_i(x)}{n w_i} - g_i\right), \quad g_i' = g_i + u_i, \quad
              \text{emit}\ g' = g + \sum_i w_i u_i

    The best weights are ``w_i = L_i/sum_j L_j`` (:func:`ef_optax.theory.weights`), with the step
    :func:`ef_optax.theory.ef21_w_step`. For positively homogeneous compressors (top-k, scaled sign)
    the iterates are those of EF21, and the gain is that the theory allows a larger step. With
    stochastic gradients (EF21-W-SGD) use the same transformation. For partial participation
    (EF21-W-PP) use ``ef21_partial_participation(..., weights=weights)``. The step sizes of these
    two forms are unverified constants, so none is given here.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      weights: n positive numbers that sum to 1, one per worker in the order of the axis.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EF21State` whose
      estimates are those of ``grad f_i/(n w_i)``.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for weights that are not
        positive, do not sum to 1, or are not as many as there are workers; for an unknown ``init``
        or a compressor that is not additive; at init, for a compressor that makes the memory of a
        leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.ef21_w(ef.identity(), (0.25, 0.75), axis_name="w"), 2, "w")
      >>> params = jnp.zeros(1)
      >>> updates, state = tx.update(jnp.array([[1.0], [3.0]]), tx.init(params), params)
      >>> updates.tolist(), state.estimate.tolist()
      ([2.0], [[2.0], [2.0]])

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean
      of Smoothness Constants", ICLR 2024.
    """
    check.word("ef21_w", "init", init, difference.INITS)
    shares.check_shares("ef21_w", weights)
    exchange = exchange_for("ef21_w", compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    estimates = difference.Estimates(exchange, memory_for(memory, axis_name), init)

    def init_fn(params: Any) -> EF21State:
        return EF21State(*estimates.begin(params))

    def update_fn(
        updates: Any, state: EF21State, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21State]:
        del params, extra_args
        share = shares.own_share("ef21_w", weights, axis_name)  # n w_i
        target = jax.tree.map(lambda x: x / share.astype(x.dtype), trees.wide(updates))
        _, g, kept = estimates.follow(target, *state, share=share)
        return trees.emit(g, updates), EF21State(*kept)

    return as_transformation(init_fn, update_fn)
