"""EF21-SGDM and EF21-SGD2M (Fatkhullin, Tyurin, Richtarik 2023): momentum inside EF21's target.

v_i = (1 - eta) v_i + eta grad f_i(x; xi)          SGD2M also:  u_i = (1 - eta) u_i + eta v_i
c_i = C(v_i - g_i)   (SGD2M: u_i - g_i)
g_i = g_i + c_i ;  g = g + mean_i c_i ;  emit g
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
    moving_average,
    trees,
)


class EF21MomentumState(NamedTuple):
    """State of :func:`ef21_momentum` and :func:`ef21_double_momentum`."""

    averages: tuple[Any, ...]  # per worker, like the parameters: (v_i,) or (v_i, u_i)
    estimate: Any  # per worker, like the parameters: g_i
    mean: Any  # like the parameters: the mean of the estimates
    exchange: ExchangeState


def ef21_momentum(
    compressor: Compressor,
    fresh_weight: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-SGDM: EF21 that tracks an average of stochastic gradients, for small batches.

    .. math:: v_i' = (1 - \eta) v_i + \eta \nabla f_i(x; \xi), \quad c_i = C(v_i' - g_i), \quad
              g_i' = g_i + c_i, \quad \text{emit}\ g' = g + \text{mean}_i\,c_i

    The first average is the first gradient. With ``fresh_weight=1`` it is :func:`ef21`. Step size
    (constants unverified): :func:`ef_optax.theory.ef21_momentum_step`. For the parameter-agnostic
    forms of Sadiev et al. (2025), normalise the update after it (:func:`ef21_normalised`).

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      fresh_weight: eta in (0, 1], the weight of the *fresh* gradient (one minus the usual decay),
        or a schedule of it.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which averages and estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an
      :class:`EF21MomentumState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a weight outside (0, 1], an
        unknown ``init`` or a compressor that is not additive; at init, for a compressor that makes
        the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_momentum(ef.identity(), 0.25)
      >>> params = jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([4.0]), tx.init(params), params)
      >>> tx.update(jnp.array([8.0]), state, params)[0].tolist()
      [5.0]

    References:
      Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023.
    """
    return _with_averages("ef21_momentum", 1, compressor, fresh_weight, axis_name, init, memory)


def ef21_double_momentum(
    compressor: Compressor,
    fresh_weight: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-SGD2M: :func:`ef21_momentum` with an average of the average.

    .. math:: v_i' = (1 - \eta) v_i + \eta \nabla f_i(x; \xi), \quad
              u_i' = (1 - \eta) u_i + \eta v_i', \quad c_i = C(u_i' - g_i)

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      fresh_weight: eta in (0, 1], the weight of the *fresh* value in both averages, or a schedule.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which averages and estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an
      :class:`EF21MomentumState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a weight outside (0, 1], an
        unknown ``init`` or a compressor that is not additive; at init, for a compressor that makes
        the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_double_momentum(ef.identity(), 0.5)
      >>> params = jnp.zeros(1)
      >>> _, state = tx.update(jnp.array([4.0]), tx.init(params), params)
      >>> tx.update(jnp.array([8.0]), state, params)[0].tolist()
      [5.0]

    References:
      Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023.
    """
    return _with_averages(
        "ef21_double_momentum", 2, compressor, fresh_weight, axis_name, init, memory
    )


def _with_averages(
    rule: str,
    depth: int,
    compressor: Compressor,
    fresh_weight: optax.ScalarOrSchedule,
    axis_name: AxisName,
    init: difference.Init,
    memory: MemoryLike,
) -> optax.GradientTransformationExtraArgs:
    check.word(rule, "init", init, difference.INITS)
    check.weight(rule, "fresh_weight", fresh_weight, schedule=True)
    exchange = exchange_for(rule, compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    memory = memory_for(memory, axis_name)
    estimates = difference.Estimates(exchange, memory, init)

    def init_fn(params: Any) -> EF21MomentumState:
        averages = tuple(memory.zeros(params) for _ in range(depth))
        return EF21MomentumState(averages, *estimates.begin(params))

    def update_fn(
        updates: Any, state: EF21MomentumState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21MomentumState]:
        del params, extra_args
        count = state.exchange.step
        fresh, averages = trees.wide(updates), []
        for old in memory.read(state.averages):
            fresh = moving_average(fresh_weight, count, old, fresh)
            averages.append(fresh)
        _, g, kept = estimates.follow(fresh, state.estimate, state.mean, state.exchange)
        averages = memory.write(tuple(averages), state.averages, count)
        return trees.emit(g, updates), EF21MomentumState(averages, *kept)

    return as_transformation(init_fn, update_fn)
