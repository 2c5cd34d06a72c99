"""New name (authors, year): what it remembers, in one line.

p_i = g_i + e_i
c_i = C(p_i) ;  e_i = p_i - c_i ;  emit mean_i c_i
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
    as_transformation,
    exchange_for,
    memory_for,
    trees,
)


class NewNameState(NamedTuple):
    """State of :func:`new_name`."""

    residual: Any  # per worker, like the parameters: e_i
    exchange: ExchangeState


def new_name(
    compressor: Compressor, *, axis_name: AxisName = None, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""What it does, in one line.

    .. math:: c_i = C(g_i + e_i), \quad e_i' = g_i + e_i - c_i, \quad
              \text{emit}\ \text{mean}_i\,c_i

    Where to put it in a chain, and when to use it.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a :class:`NewNameState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: at init, for a compressor that
        makes the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.new_name(ef.top_k(k=1))
      >>> updates, state = tx.update(jnp.array([3.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist(), state.residual.tolist()
      ([3.0, 0.0], [0.0, 2.0])

    References:
      Authors, Title, year, algorithm.
    """
    exchange = exchange_for("new_name", compressor, axis_name, needs=(CONTRACTIVE,))
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> NewNameState:
        e = memory.zeros(params)
        return NewNameState(e, exchange.init(memory.read(e)))

    def update_fn(
        updates: Any, state: NewNameState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NewNameState]:
        del params, extra_args
        p = trees.add(memory.read(state.residual), updates)
        out = exchange(p, state.exchange, want=("residual",))
        e = memory.write(out.residual, state.residual, out.state.step)
        return trees.emit(out.aggregate, updates), NewNameState(e, out.state)

    return as_transformation(init_fn, update_fn)
