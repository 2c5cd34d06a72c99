"""Special steps: dense steps, silent steps, and the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._exchange import collectives as coll
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric.dtypes import Array
from ef_optax.compressors.combine.identity import Identity


def send_dense(exchange: Exchange, tree: Any, state: ExchangeState) -> tuple[Any, ExchangeState]:
    """The mean of the uncompressed trees, over the same workers and with the same state."""
    dense = Exchange(Identity(), exchange.axis_name, estimates=exchange.estimates)
    out = dense(tree, state._replace(codec=()))
    return out.aggregate, out.state._replace(codec=state.codec)


LONE = "(alone)"
"""The path of an array that travels by itself; no parameter has this name."""


def lone(x: Array) -> dict[str, Array]:
    """An array that is not a leaf of the parameters, as a tree to exchange."""
    return {LONE: x}


def silent_init(exchange: Exchange) -> ExchangeState:
    """The state of :func:`silent`."""
    return Exchange(Identity(), exchange.axis_name).init(lone(jnp.zeros((), jnp.float32)))


def silent(exchange: Exchange, tree: Any, state: ExchangeState) -> tuple[Any, ExchangeState]:
    """Sends one number in place of ``tree``, so that all workers skip a bad step together.

    Returns:
      Zeros like ``tree``, which are the same on all workers (for JAX's types too), and the next
      state.
    """
    beat = sum(jnp.sum(x * 0).astype(jnp.float32) for x in jax.tree.leaves(tree))
    out = Exchange(Identity(), exchange.axis_name)(lone(jnp.asarray(beat, jnp.float32)), state)
    zero = out.aggregate[LONE]
    return jax.tree.map(lambda x: jnp.broadcast_to(zero.astype(x.dtype), x.shape), tree), out.state


def first_step(
    exchange: Exchange, state: ExchangeState, first: Callable[[], Any], later: Callable[[], Any]
) -> Any:
    """``first()`` at the first exchange, ``later()`` at all others; only one of them runs."""
    return coll.agreed_cond(state.step == 0, first, later, axis=exchange.axis_name)
