"""Error feedback with an averaged input: the recipe that is often quoted, and its simpler form.

m = beta m + (1 - beta)(g + e) ;  c = C(m) ;  e = m - c          as it is quoted
r = r + g ;  c = C((1 - beta) r) ;  r = r - c                    the same c with one buffer
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    Recurrence,
    as_transformation,
    check,
    exchange_for,
    memory_for,
    trees,
)


class EFMomentumState(NamedTuple):
    """State of :func:`ef_momentum`."""

    residual: Any  # per worker, like the parameters: r, what is not yet sent
    exchange: ExchangeState


def ef_momentum(
    compressor: Compressor,
    beta: float,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback that sends from a damped residual, ``C((1 - beta) r)``.

    .. math:: r' = r + g, \quad c = C((1 - \beta) r'), \quad r'' = r' - c, \quad
              \text{emit mean}_i\,c_i

    The recipe ``m = beta m + (1 - beta)(g + e)``, ``c = C(m)``, ``e = m - c`` gives exactly these
    messages, with ``m = (1 - beta) r'``. So nothing is lost, and it is :func:`error_feedback` (in
    gradient units) with the damped compressor ``v -> C((1 - beta) v)``, whose contraction is
    :func:`ef_optax.theory.damped_contraction`. For C = I it emits an exponential average of the
    gradients. It is neither EF21-SGDM (:func:`ef21_momentum`) nor DGC (:func:`dgc`) nor
    dist-EF-SGDM (:func:`dist_ef_sgdm`).

    Args:
      compressor: what is sent, such as ``ef.top_k(0.01)``.
      beta: weight of the past in [0, 1); 0 is :func:`error_feedback`.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EFMomentumState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a beta outside [0, 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef_momentum(ef.identity(), 0.5)
      >>> updates, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> updates.tolist(), state.residual.tolist()
      ([2.0], [2.0])

    References:
      Derived from Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019,
      Algorithm 2.
    """
    check.decay("ef_momentum", "beta", beta)
    # The damped codec contracts if omega < (1 + beta)/(1 - beta).
    recurrence = Recurrence(beta, 1 - beta, f"use a larger beta, or {CONTRACTIVE.remedy}")
    exchange = exchange_for("ef_momentum", compressor, axis_name, recurrence=recurrence)
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> EFMomentumState:
        r = memory.zeros(params)
        return EFMomentumState(residual=r, exchange=exchange.init(memory.read(r)))

    def update_fn(
        updates: Any, state: EFMomentumState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EFMomentumState]:
        del params, extra_args
        r = trees.add(memory.read(state.residual), trees.wide(updates))
        out = exchange(trees.scale(1 - beta, r), state.exchange, want=("residual",))
        # r - c, with the exact residual (1 - beta) r - c of the codec
        r = trees.axpy(beta, r, out.residual)
        r = memory.write(r, state.residual, out.state.step)
        return trees.emit(out.aggregate, updates), EFMomentumState(r, out.state)

    return as_transformation(init_fn, update_fn)
