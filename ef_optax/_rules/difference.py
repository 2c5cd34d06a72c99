"""Differences to an estimate: followed by both sides, and how they begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.trees import add, scale, sub
from ef_optax._rules.steps import first_step, silent
from ef_optax.compressors.combine.identity import Identity

Init = Literal["compressed", "full", "zero"]


INITS = ("compressed", "full", "zero")


def track(
    exchange: Exchange,
    target: Any,
    estimate: Any,
    mean: Any,
    state: ExchangeState,
    *,
    share: Array | None = None,
    present: Array | None = None,
) -> tuple[Any, Any, ExchangeState]:
    """``c_i = C(target_i - g_i)``; ``g_i <- g_i + c_i``; ``g <- g + mean_i c_i``.

    Args:
      exchange: how the differences travel.
      target: what this worker's estimate is to follow.
      estimate: g_i.
      mean: g.
      state: the exchange's state.
      share: this worker's weight in the mean (None: one).
      present: 1 if this worker takes part in this step, else 0 (None: it does).

    Returns:
      The next g_i, the next g, the next state of the exchange.
    """
    weight = _product(share, present)
    out = exchange(sub(target, estimate), state, weight=weight, want=("sent",))
    own = out.sent if present is None else scale(present, out.sent)
    return add(estimate, own), add(mean, out.aggregate), out.state


def start(
    init: Init,
    exchange: Exchange,
    target: Any,
    estimate: Any,
    mean: Any,
    state: ExchangeState,
    *,
    share: Array | None = None,
    present: Array | None = None,
    later: Callable[[], tuple[Any, Any, ExchangeState]] | None = None,
) -> tuple[Any, Any, ExchangeState]:
    """:func:`track` (or ``later``), with another first step if ``init`` asks for one.

    ``"compressed"`` starts from ``g_i = 0``, so that ``g_i^0 = C(target)``; ``"full"`` sends the
    first target dense; ``"zero"`` sends nothing at first (but one number that tells whether all is
    finite) and keeps ``g_i^0 = 0``.
    """

    def ordinary() -> tuple[Any, Any, ExchangeState]:
        if later is not None:
            return later()
        return track(exchange, target, estimate, mean, state, share=share, present=present)

    def full() -> tuple[Any, Any, ExchangeState]:
        dense = Exchange(Identity(), exchange.axis_name)
        bare = state._replace(codec=())
        own, aggregate, after = track(
            dense, target, estimate, mean, bare, share=share, present=present
        )
        return own, aggregate, after._replace(codec=state.codec)

    def zero() -> tuple[Any, Any, ExchangeState]:
        _, after = silent(exchange, target, state._replace(codec=()))
        return estimate, mean, after._replace(codec=state.codec)

    if init == "compressed":
        return ordinary()
    return first_step(exchange, state, full if init == "full" else zero, ordinary)


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b
