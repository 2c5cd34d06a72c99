"""ScaleCom (Chen et al. 2020): one worker's indices for all workers, and a low-pass memory.

leader t mod n chooses the top-k indices of its m_i + g_i ;  all workers send their values there
m_i = m_i + beta (g_i - sent_i) ;  emit mean_i sent_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.exchanges.leader import leader_top_k
from ef_optax.extend import (
    AxisName,
    Exchange,
    ExchangeState,
    MemoryLike,
    as_transformation,
    check,
    check_ratio_or_k,
    codec_of,
    memory_for,
    trees,
)


class ScaleComState(NamedTuple):
    """State of :func:`scalecom`."""

    residual: Any  # per worker, like the parameters: m_i
    exchange: ExchangeState


def scalecom(
    ratio: float | None = None,
    *,
    k: int | None = None,
    beta: float = 1.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ScaleCom: cyclic local top-k (:func:`leader_top_k`) with a low-pass filter on the memory.

    .. math:: c_i = C_t(m_i + g_i), \quad m_i' = m_i + \beta (g_i - c_i), \quad
              \text{emit mean}_i\,c_i

    ``beta = 1`` is :func:`error_feedback` with shared indices. Below 1 the memory forgets
    ``(1 - beta)`` of the fresh error at every step; the paper uses 0.1 for large batches.

    Args:
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.
      beta: the filter's weight in (0, 1].
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a :class:`ScaleComState`.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, or for a beta outside (0, 1].

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx, g = ef.scalecom(k=1, beta=0.5), jnp.array([3.0, 2.0])
      >>> updates, state = jax.jit(tx.update)(g, tx.init(g))
      >>> updates.tolist(), state.residual.tolist()
      ([3.0, 0.0], [0.0, 1.0])

    References:
      Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient
      Distributed Training", NeurIPS 2020.
    """
    check_ratio_or_k("scalecom", ratio, k)
    check.weight("scalecom", "beta", beta)
    exchange = Exchange(codec_of(leader_top_k(ratio, k=k)), axis_name)
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> ScaleComState:
        m = memory.zeros(params)
        return ScaleComState(residual=m, exchange=exchange.init(memory.read(m)))

    def update_fn(
        updates: Any, state: ScaleComState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ScaleComState]:
        del params, extra_args
        m, g = memory.read(state.residual), trees.wide(updates)
        out = exchange(trees.add(m, g), state.exchange, want=("residual",))
        # m + beta (g - sent) = (1 - beta) m + beta (m + g - sent)
        m = trees.axpy(beta, out.residual, trees.scale(1 - beta, m))
        m = memory.write(m, state.residual, out.state.step)
        return trees.emit(out.aggregate, updates), ScaleComState(m, out.state)

    return as_transformation(init_fn, update_fn)
