"""EF21-P (Gruntkowska, Tyurin, Richtarik 2023): compressed steps from the server to the workers.

x = x - gamma g(w) ;  w = w + C(x - w) ;  gradients at w
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    BROADCAST,
    CONTRACTIVE,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    exchange_for,
    memory_for,
    trees,
)


class EF21PState(NamedTuple):
    """State of :func:`ef21_p`."""

    behind: Any  # like the parameters: x - w, how far the workers' model is behind
    exchange: ExchangeState


def ef21_p(
    compressor: Compressor, *, memory: MemoryLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-P: workers hold the model w, which follows the server's x by compressed differences.

    .. math:: x' = x + u, \quad w' = w + C(x' - w)

    Here u is the step of the optimizer before it, so it must be *last* in a chain. The parameters
    of the training loop are w, at which gradients are taken. The server's model is
    ``params + state.behind``; evaluate this one. With C = I nothing changes. With exact gradients,
    w is the iterate of classic error feedback in step units, and x its virtual iterate. The rule
    has no axis, because all workers compute the same downlink and its messages do not travel.

    Args:
      compressor: C, contractive, such as ``ef.top_k(0.01)``.
      memory: the dtype in which x - w is stored, as in :func:`ef21`.

    Returns:
      The transformation; its state is an :class:`EF21PState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: at init, for a compressor that
        makes the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), ef.ef21_p(ef.top_k(k=1)))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([-3.0, -2.0]), tx.init(params), params)
      >>> updates.tolist(), state[1].behind.tolist()
      ([3.0, 0.0], [0.0, 2.0])

    References:
      Gruntkowska, Tyurin, Richtarik, "EF21-P and Friends: Improved Theoretical Communication
      Complexity for Distributed Optimization with Bidirectional Compression", ICML 2023.
    """
    exchange = exchange_for("ef21_p", compressor, needs=(BROADCAST, CONTRACTIVE))
    memory = memory_for(memory)

    def init_fn(params: Any) -> EF21PState:
        behind = memory.zeros(params)
        return EF21PState(behind=behind, exchange=exchange.init(memory.read(behind)))

    def update_fn(
        updates: Any, state: EF21PState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21PState]:
        del params, extra_args
        ahead = trees.add(memory.read(state.behind), updates)  # x' - w
        out = exchange(ahead, state.exchange, want=("residual",))
        behind = memory.write(out.residual, state.behind, out.state.step, shared=True)
        return trees.emit(out.aggregate, updates), EF21PState(behind, out.state)

    return as_transformation(init_fn, update_fn)
