"""Qsparse-local-SGD (Basu, Data, Karakus, Diggavi 2019): local steps, then a compressed drift.

every step:     y_i = y_i - eta grad f_i(y_i)
every H steps:  D_i = m_i + x - y_i ;  c_i = C(D_i) ;  m_i = D_i - c_i
                x = x - mean_i c_i ;  y_i = x
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    check,
    exchange_for,
    memory_for,
    own_models,
    steps,
    trees,
)


class QsparseLocalSGDState(NamedTuple):
    """State of :func:`qsparse_local_sgd`."""

    ahead: Any  # per worker, like the parameters: y_i - x, the drift since the last synchronisation
    residual: Any  # per worker, like the parameters: m_i
    exchange: ExchangeState  # of the drifts
    flags: ExchangeState  # of one number per step, which shows whether all gradients are finite

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken."""
        return own_models.own_model("qsparse_local_sgd", self.ahead, params)


def qsparse_local_sgd(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    period: int,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Qsparse-local-SGD: H local steps, then error feedback on the drift.

    .. math:: y_i' = y_i - \eta \nabla f_i(y_i); \quad \text{every } H \text{ steps}\quad
              c_i = C(m_i + x - y_i'), \quad m_i' = m_i + x - y_i' - c_i, \quad
              x' = x - \text{mean}_i\,c_i, \quad y_i'' = x'

    The training loop's parameters are x, which does not change between two synchronisations;
    gradients are taken at each worker's own y_i (:func:`query_points`). It is a complete optimizer,
    so no transformation after it may change the updates. With ``period=1`` it is
    :func:`error_feedback` in step units, and with the identity it is local SGD. Between two
    synchronisations only one number per step travels, which shows whether all gradients are finite.

    Args:
      compressor: C; in the publication a quantiser inside a sparsifier:
        ``ef.compose(ef.qsgd(...), ef.top_k(...))``.
      learning_rate: eta of the local steps, a number or a schedule of the step.
      period: H, at least 1.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which drift and residual are stored, as in
        :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`QsparseLocalSGDState`. Call
      ``update(grads["params"], state, params, grads=grads)`` with gradients at all query points.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a period below 1, and at
        update if gradients at the query points are missing; at init, for a compressor that makes
        the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.local.qsparse_local_sgd(ef.top_k(k=1), 1.0, period=2)
      >>> params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     grads = {"qsparse_local_sgd": jnp.array([3.0, 2.0])}
      ...     updates, state = tx.update(params, state, params, grads=grads)
      >>> updates.tolist(), state.residual.tolist()
      ([-6.0, -0.0], [0.0, 4.0])

    References:
      Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD: Distributed SGD with Quantization,
      Sparsification, and Local Computations", NeurIPS 2019 (synchronous form, from the literature).
    """
    check.rate("qsparse_local_sgd", "learning_rate", learning_rate)
    check.count("qsparse_local_sgd", "period", period)
    exchange = exchange_for("qsparse_local_sgd", compressor, axis_name, needs=(CONTRACTIVE,))
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> QsparseLocalSGDState:
        ahead, m = memory.zeros(params), memory.zeros(params)
        flags = steps.silent_init(exchange)
        return QsparseLocalSGDState(ahead, m, exchange.init(memory.read(m)), flags)

    def update_fn(
        updates: Any, state: QsparseLocalSGDState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, QsparseLocalSGDState]:
        del params
        g, eta = own_models.own_gradient(
            "qsparse_local_sgd", learning_rate, state.flags.step, extra_args
        )
        ahead, m = memory.read((state.ahead, state.residual))
        y = own_models.descend(ahead, eta, g)  # y_i - x
        zero, flags = steps.silent(exchange, g, state.flags)

        def synchronise() -> tuple[Any, Any, Any, ExchangeState]:
            out = exchange(trees.sub(m, y), state.exchange, want=("residual",))
            step = trees.scale(-1, out.aggregate)
            return step, jax.tree.map(jnp.zeros_like, y), out.residual, out.state

        def go_on() -> tuple[Any, Any, Any, ExchangeState]:
            return zero, y, m, state.exchange

        step, ahead, m, sent = own_models.every(period, flags.step, synchronise, go_on, axis_name)
        after = QsparseLocalSGDState(
            ahead=memory.write(ahead, state.ahead, flags.step),
            residual=memory.write(m, state.residual, flags.step),
            exchange=sent,
            flags=flags,
        )
        return trees.emit(step, updates), after

    return as_transformation(init_fn, update_fn)
