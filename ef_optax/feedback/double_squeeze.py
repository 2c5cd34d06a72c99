"""DoubleSqueeze (Tang et al. 2019): error feedback on the worker and on the server.

v_i = g_i + e_i ;  send Q(v_i) ;  e_i = v_i - Q(v_i)
server:  v = mean_i Q(v_i) + E ;  broadcast Q(v) ;  E = v - Q(v)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    BROADCAST,
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


class DoubleSqueezeState(NamedTuple):
    """State of :func:`double_squeeze`."""

    residual: Any  # per worker, like the parameters: e_i
    server_residual: Any  # like the parameters: E
    uplink: ExchangeState
    downlink: ExchangeState


def double_squeeze(
    compressor: Compressor,
    server: Compressor | None = None,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DoubleSqueeze: compresses both directions and remembers both errors, in gradient units.

    .. math:: c_i = Q(g_i + e_i), \quad e_i' = g_i + e_i - c_i, \quad
              \text{emit}\ C = Q(\text{mean}_i\,c_i + E), \quad E' = \text{mean}_i\,c_i + E - C

    The virtual iterate ``x - gamma (E + mean_i e_i)`` moves by the exact mean gradient. There is no
    server process: every worker gathers the messages and computes the server's part with the same
    E, so the broadcast is computed and not transmitted. This gives the algorithm's iterates, for
    studying it.

    Args:
      compressor: Q of the workers.
      server: Q of the server, by default that of the workers. With the identity the rule is
        :func:`error_feedback`.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which both residuals are stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is a
      :class:`DoubleSqueezeState`.

    Raises:
      TypeError: if an argument is not a Compressor. ValueError: at init, for a compressor that
        makes the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.double_squeeze(ef.top_k(k=2), ef.top_k(k=1))
      >>> updates, state = tx.update(jnp.array([3.0, 2.0, 1.0]), tx.init(jnp.zeros(3)))
      >>> updates.tolist(), state.residual.tolist(), state.server_residual.tolist()
      ([3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 2.0, 0.0])

    References:
      Tang, Lian, Yu, Zhang, Liu, "DoubleSqueeze: Parallel Stochastic Gradient Descent with
      Double-Pass Error-Compensated Compression", ICML 2019.
    """
    uplink = exchange_for("double_squeeze", compressor, axis_name, needs=(CONTRACTIVE,))
    server = compressor if server is None else server
    downlink = exchange_for(
        "double_squeeze", server, argument="server", needs=(BROADCAST, CONTRACTIVE)
    )
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> DoubleSqueezeState:
        e, E = memory.zeros(params), memory.zeros(params)
        wide = memory.read(e)
        return DoubleSqueezeState(e, E, uplink.init(wide), downlink.init(wide))

    def update_fn(
        updates: Any, state: DoubleSqueezeState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DoubleSqueezeState]:
        del params, extra_args
        e, E = memory.read((state.residual, state.server_residual))
        v_i = trees.add(trees.wide(updates), e)
        up = uplink(v_i, state.uplink, want=("residual",))
        v = trees.add(up.aggregate, E)
        down = downlink(v, state.downlink, want=("residual",))
        step = up.state.step
        after = DoubleSqueezeState(
            residual=memory.write(up.residual, state.residual, step),
            server_residual=memory.write(down.residual, state.server_residual, step, shared=True),
            uplink=up.state,
            downlink=down.state,
        )
        return trees.emit(down.aggregate, updates), after

    return as_transformation(init_fn, update_fn)
