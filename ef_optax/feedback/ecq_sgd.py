"""ECQ-SGD (Wu et al. 2018): error compensation with two factors.

q = Q(g + alpha h) ;  h = beta h + (g - q) ;  emit mean_i q_i
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


class ECQState(NamedTuple):
    """State of :func:`ecq_sgd`."""

    residual: Any  # per worker, like the parameters: h
    exchange: ExchangeState


def ecq_sgd(
    compressor: Compressor,
    alpha: float,
    beta: float,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ECQ-SGD: adds a share of the accumulated error to the gradient, and decays the old error.

    .. math:: q = Q(g + \alpha h), \quad h' = \beta h + (g - q), \quad \text{emit mean}_i\,q_i

    ``beta = 1`` is :func:`error_feedback` with ``injection=alpha``. Below 1 the *old* memory loses
    ``1 - beta`` of itself at every step; ``decay`` there acts on the fresh error too.

    Args:
      compressor: Q, what is sent.
      alpha: strength of the compensation, at least 0.
      beta: decay of the old memory in [0, 1].
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`ECQState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for alpha or beta out of range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ecq_sgd(ef.top_k(k=1), alpha=0.5, beta=0.9)
      >>> _, state = tx.update(jnp.array([3.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> tx.update(jnp.array([1.0, 1.0]), state)[0].tolist()  # 1 + 0.5 * 2
      [0.0, 2.0]

    References:
      Wu, Huang, Huang, Zhang, "Error Compensated Quantized SGD and its Applications to Large-scale
      Distributed Optimization", ICML 2018.
    """
    check.not_negative("ecq_sgd", "alpha", alpha)
    check.share("ecq_sgd", "beta", beta)
    recurrence = Recurrence(beta - alpha, alpha, f"use a smaller alpha, or {CONTRACTIVE.remedy}")
    exchange = exchange_for("ecq_sgd", compressor, axis_name, recurrence=recurrence)
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> ECQState:
        h = memory.zeros(params)
        return ECQState(residual=h, exchange=exchange.init(memory.read(h)))

    def update_fn(
        updates: Any, state: ECQState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ECQState]:
        del params, extra_args
        h = memory.read(state.residual)
        p = trees.axpy(alpha, h, trees.wide(updates))
        out = exchange(p, state.exchange, want=("residual",))
        # g - q = (p - q) - alpha h
        h = trees.axpy(beta - alpha, h, out.residual)
        h = memory.write(h, state.residual, out.state.step)
        return trees.emit(out.aggregate, updates), ECQState(h, out.state)

    return as_transformation(init_fn, update_fn)
