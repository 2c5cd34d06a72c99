"""dist-EF-SGDM (Zheng, Huang, Kwok 2019): local momentum, and feedback on workers and server.

worker:  m_i = mu m_i + g_i ;  p_i = mu m_i + g_i + (eta_{t-1}/eta_t) e_i
D_i = C(p_i) ;  push D_i ;  e_i = p_i - D_i
server:  q = mean_i D_i + (eta_{t-1}/eta_t) E ;  D = C(q) ;  push D ;  E = q - D
all:     x = x - eta_t D
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import (
    BROADCAST,
    CONTRACTIVE,
    Array,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    arguments,
    as_transformation,
    check,
    exchange_for,
    memory_for,
    trees,
)


class DistEFSGDMState(NamedTuple):
    """State of :func:`dist_ef_sgdm`."""

    momentum: Any  # per worker, like the parameters: m_i
    residual: Any  # per worker, like the parameters: e_i
    server_residual: Any  # like the parameters: E
    last_rate: Array  # scalar: the last learning rate that was not zero
    uplink: ExchangeState
    downlink: ExchangeState


def dist_ef_sgdm(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    server: Compressor | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""dist-EF-SGDM: momentum before compression, and learning-rate-corrected residuals.

    .. math:: m_i' = \mu m_i + g_i, \quad p_i = \mu m_i' + g_i + \tfrac{\eta_{t-1}}{\eta_t} e_i,
              \quad D_i = C(p_i), \quad q = \text{mean}_i\,D_i + \tfrac{\eta_{t-1}}{\eta_t} E, \quad
              \text{emit}\ D = C(q)

    The published compressor is the block-wise scaled sign with one block per tensor,
    ``ef.scaled_sign()``. Cite the algorithm and not its theorem, because problems in the original
    proof have been reported (second-hand). Every worker computes the server's part, as in
    :func:`double_squeeze`. In a step whose rate is zero nothing is applied, and the residuals stay
    as they are.

    Args:
      compressor: C of the workers.
      learning_rate: eta, the same number or schedule object that ``optax.sgd`` gets after it.
      momentum: mu in [0, 1).
      nesterov: whether to send ``mu m + g`` (the paper's main form) instead of m (heavy ball).
      server: C of the server, by default that of the workers; the identity switches the second
        compression off.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which momentum and residuals are stored, as in :func:`error_feedback`.

    Returns:
      The transformation, to be put before ``optax.sgd(learning_rate)``; its state is a
      :class:`DistEFSGDMState`.

    Raises:
      TypeError: if an argument is not a Compressor. ValueError: for a momentum outside [0, 1); at
        init, for a compressor that makes the memory of a leaf grow (scaled random-k with omega >=
        1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.dist_ef_sgdm(ef.top_k(k=1), 0.1, momentum=0.5, server=ef.identity())
      >>> updates, state = tx.update(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist(), state.residual.tolist()
      ([6.0, 0.0], [0.0, 3.0])

    References:
      Zheng, Huang, Kwok, "Communication-Efficient Distributed Blockwise Momentum SGD with
      Error-Feedback", NeurIPS 2019; the ratio as in bytedance/byteps.
    """
    check.rate("dist_ef_sgdm", "learning_rate", learning_rate)
    check.decay("dist_ef_sgdm", "momentum", momentum)
    check.flag("dist_ef_sgdm", "nesterov", nesterov)
    uplink = exchange_for("dist_ef_sgdm", compressor, axis_name, needs=(CONTRACTIVE,))
    server = compressor if server is None else server
    downlink = exchange_for(
        "dist_ef_sgdm", server, argument="server", needs=(BROADCAST, CONTRACTIVE)
    )
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> DistEFSGDMState:
        m, e, E = memory.zeros(params), memory.zeros(params), memory.zeros(params)
        rate, wide = jnp.zeros((), trees.widest(params)), memory.read(e)
        return DistEFSGDMState(m, e, E, rate, uplink.init(wide), downlink.init(wide))

    def update_fn(
        updates: Any, state: DistEFSGDMState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DistEFSGDMState]:
        del params, extra_args
        g = trees.wide(updates)
        rate = arguments.value_at(learning_rate, state.uplink.step)
        rate = jnp.asarray(rate, state.last_rate.dtype)
        active = rate != 0
        ratio = state.last_rate / jnp.where(active, rate, 1)
        m_i, e, E = memory.read((state.momentum, state.residual, state.server_residual))
        m_i = trees.axpy(momentum, m_i, g)
        p_i = trees.axpy(momentum, m_i, g) if nesterov else m_i
        up = uplink(trees.axpy(ratio, e, p_i), state.uplink, want=("residual",))
        q = trees.axpy(ratio, E, up.aggregate)
        down = downlink(q, state.downlink, want=("residual",))
        step = up.state.step
        e = memory.write(up.residual, state.residual, step)
        E = memory.write(down.residual, state.server_residual, step, shared=True)
        after = DistEFSGDMState(
            momentum=memory.write(m_i, state.momentum, step),
            residual=trees.where(active, e, state.residual),
            server_residual=trees.where(active, E, state.server_residual),
            last_rate=jnp.where(active, rate, state.last_rate),
            uplink=up.state,
            downlink=down.state,
        )
        emitted = trees.scale(active, down.aggregate)
        return trees.emit(emitted, updates), after

    return as_transformation(init_fn, update_fn)
