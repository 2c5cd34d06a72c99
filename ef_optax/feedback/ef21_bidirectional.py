"""EF21-BC (Fatkhullin et al. 2021): EF21 in both directions.

gw_i = gw_i + C_w(grad f_i(x) - gw_i)      the server's estimate of worker i's gradient
b    = C_M(mean_i gw_i - g)
g    = g + b                               the workers' estimate of the mean;  emit g
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    ADDITIVE,
    BROADCAST,
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    difference,
    exchange_for,
    memory_for,
    trees,
)


class EF21BidirectionalState(NamedTuple):
    """State of :func:`ef21_bidirectional`."""

    estimate: Any  # per worker, like the parameters: gw_i
    mean: Any  # like the parameters: the mean of gw_i, which the server has
    broadcast: Any  # like the parameters: g, which all workers have
    uplink: ExchangeState
    downlink: ExchangeState


def ef21_bidirectional(
    compressor: Compressor,
    server: Compressor,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-BC: EF21 from the workers to the server, and from the server to the workers.

    .. math:: gw_i' = gw_i + C_w(\nabla f_i(x) - gw_i), \quad
              \text{emit}\ g' = g + C_M(\text{mean}_i\,gw_i' - g)

    There is no server process: every worker gathers the messages and computes the server's part, so
    the downlink is computed and not transmitted. This gives the algorithm's iterates, for studying
    it.

    Args:
      compressor: C_w, the uplink; contractive.
      server: C_M, the downlink; contractive. With the identity the rule is :func:`ef21`.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an
      :class:`EF21BidirectionalState`.

    Raises:
      TypeError: if an argument is not a Compressor. ValueError: for an uplink compressor that is
        not additive; at init, for a compressor that makes the memory of a leaf grow (scaled
        random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_bidirectional(ef.top_k(k=2), ef.top_k(k=1))
      >>> params = jnp.zeros(3)
      >>> updates, state = tx.update(jnp.array([3.0, 2.0, 1.0]), tx.init(params), params)
      >>> state.mean.tolist(), updates.tolist()
      ([3.0, 2.0, 0.0], [3.0, 0.0, 0.0])

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021.
    """
    uplink = exchange_for(
        "ef21_bidirectional", compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE)
    )
    downlink = exchange_for(
        "ef21_bidirectional", server, argument="server", needs=(BROADCAST, CONTRACTIVE)
    )
    memory = memory_for(memory, axis_name)
    estimates = difference.Estimates(uplink, memory)

    def init_fn(params: Any) -> EF21BidirectionalState:
        gw_i, mean, up = estimates.begin(params)
        g = memory.zeros(params)
        return EF21BidirectionalState(gw_i, mean, g, up, downlink.init(memory.read(g)))

    def update_fn(
        updates: Any, state: EF21BidirectionalState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21BidirectionalState]:
        del params, extra_args
        _, mean, (own, kept_mean, up) = estimates.follow(
            trees.wide(updates), state.estimate, state.mean, state.uplink
        )
        g = memory.read(state.broadcast)
        out = downlink(trees.sub(mean, g), state.downlink)
        g = trees.add(g, out.aggregate)
        kept_g = memory.write(g, state.broadcast, up.step, shared=True)
        after = EF21BidirectionalState(own, kept_mean, kept_g, up, out.state)
        return trees.emit(g, updates), after

    return as_transformation(init_fn, update_fn)
