"""Momentum as the residual, of which the sent part decays (Dion, Ahn et al. 2025; Dion2; Trion).

M_i = M_i + g_i                   momentum and residual in one
c_i = C(M_i)
M_i = M_i - (1 - mu) c_i          what was sent decays, what was not sent stays
emit mean_i c_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from ef_optax.extend import (
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


class MomentumFeedbackState(NamedTuple):
    """State of :func:`momentum_feedback`."""

    momentum: Any  # per worker, like the parameters: M_i, with what was not sent yet
    exchange: ExchangeState


def momentum_feedback(
    compressor: Compressor,
    momentum: float = 0.95,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum that decays where it was sent, and waits where it was not.

    .. math:: M_i' = M_i + g_i, \quad c_i = C(M_i'), \quad M_i'' = M_i' - (1 - \mu)\,c_i, \quad
              \text{emit mean}_i\,c_i

    It is the memory of Dion, Dion2 and Trion. With mu = 0 it is :func:`error_feedback`; with C = I
    it emits the heavy-ball momentum ``optax.trace(mu)`` of the mean gradient. In between, a
    component of the gradient has momentum from the first time it is sent, and nothing of it is lost
    before. With ``ef.dion_factors`` what all workers apply differs from what decays.

    Args:
      compressor: what is sent of the momentum.
      momentum: mu in [0, 1).
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how M_i is stored, as in :func:`error_feedback`.

    Returns:
      The transformation; its state is a :class:`MomentumFeedbackState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a momentum outside [0, 1);
        at init, for a compressor that makes the memory of a leaf grow.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.momentum_feedback(ef.top_k(k=1), 0.5)
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([4.0, 3.0]), tx.init(params), params)
      >>> updates.tolist(), state.momentum.tolist()
      ([4.0, 0.0], [2.0, 3.0])

    References:
      Ahn et al., "Dion: Distributed Orthonormalized Updates", 2025, Algorithm 1; the same for rows
      in Dion2 (arXiv 2512.16928) and for frequencies in Trion.
    """
    check.decay("momentum_feedback", "momentum", momentum)
    exchange = exchange_for(
        "momentum_feedback",
        compressor,
        axis_name,
        recurrence=Recurrence(momentum, 1 - momentum),
    )
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> MomentumFeedbackState:
        M = memory.zeros(params)
        return MomentumFeedbackState(M, exchange.init(memory.read(M)))

    def update_fn(
        updates: Any, state: MomentumFeedbackState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MomentumFeedbackState]:
        del params, extra_args
        M = trees.add(memory.read(state.momentum), updates)
        out = exchange(M, state.exchange, want=("sent",))
        left = jax.tree.map(lambda m, c: m - (1 - momentum) * c.astype(m.dtype), M, out.sent)
        kept = memory.write(left, state.momentum, out.state.step)
        return trees.emit(out.aggregate, updates), MomentumFeedbackState(kept, out.state)

    return as_transformation(init_fn, update_fn)
