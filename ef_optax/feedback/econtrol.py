"""EControl (Gao, Islamov, Stich 2024): error compensation and error control together.

D_i = C(eta e_i + g_i - h_i)
e_i = e_i + g_i - h_i - D_i ;  h_i = h_i + D_i ;  emit mean_i h_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    check,
    difference,
    exchange_for,
    memory_for,
    trees,
)


class EControlState(NamedTuple):
    """State of :func:`econtrol`."""

    residual: Any  # per worker, like the parameters: e_i, the running sum of g_i - h_i
    estimate: Any  # per worker, like the parameters: h_i
    mean: Any  # like the parameters: the mean of the h_i
    exchange: ExchangeState


def econtrol(
    compressor: Compressor,
    strength: float,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EControl: EF21's estimate, corrected by a controlled share of the accumulated error.

    .. math:: D_i = C(\eta e_i + g_i - h_i), \quad e_i' = e_i + g_i - h_i - D_i, \quad
              h_i' = h_i + D_i, \quad \text{emit mean}_i\,h_i'

    ``strength=0`` is :func:`ef21`. e_i is the running sum of g_i - h_i'.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      strength: eta, at least 0; :func:`ef_optax.theory.econtrol_strength` is that of a theorem,
        the public code uses 0.1.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates h_i, as in :func:`ef21`; ``"full"`` is the paper's start with a
        dense first message.
      memory: the dtype in which residual and estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EControlState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a negative strength, an
        unknown ``init`` or a compressor that is not additive; at init, for a compressor that makes
        the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.econtrol(ef.top_k(k=1), 0.5)
      >>> updates, state = tx.update(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist(), state.residual.tolist()
      ([4.0, 0.0], [0.0, 2.0])

    References:
      Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error
      Control", ICLR 2024.
    """
    check.word("econtrol", "init", init, difference.INITS)
    check.not_negative("econtrol", "strength", strength)
    exchange = exchange_for("econtrol", compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    memory = memory_for(memory, axis_name)
    estimates = difference.Estimates(exchange, memory, init)

    def init_fn(params: Any) -> EControlState:
        return EControlState(memory.zeros(params), *estimates.begin(params))

    def update_fn(
        updates: Any, state: EControlState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EControlState]:
        del params, extra_args
        g_i, e, count = trees.wide(updates), memory.read(state.residual), state.exchange.step
        target = trees.axpy(strength, e, g_i)  # eta e_i + g_i; the difference to h_i is sent
        if init == "full":
            target = trees.where(count == 0, g_i, target)
        h_i, h, kept = estimates.follow(target, state.estimate, state.mean, state.exchange)
        grown = trees.add(e, trees.sub(g_i, h_i))
        e = trees.where(count == 0, e, grown) if init == "zero" else grown
        e = memory.write(e, state.residual, count)
        return trees.emit(h, updates), EControlState(e, *kept)

    return as_transformation(init_fn, update_fn)
