"""Differences to an estimate, which sender and receivers both follow, and the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.trees import add, scale, sub
from ef_optax._rules.memory import Memory
from ef_optax._rules.steps import first_step, silent
from ef_optax.compressors.combine.identity import Identity

Init = Literal["compressed", "full", "zero"]


INITS = ("compressed", "full", "zero")

Followed = tuple[Any, Any, ExchangeState]
"""The next g_i, the next g, the next state of the exchange."""


@dataclasses.dataclass(frozen=True)
class Estimates:
    """EF21's pair of estimates: g_i of every worker's target, and g, the mean of all g_i.

    A rule's state holds them in the form in which they are stored, with their exchange's state.

    Attributes:
      exchange: how the differences travel.
      memory: how the estimates are stored.
      init: how they begin; see :func:`start`.
    """

    exchange: Exchange
    memory: Memory
    init: Init = "compressed"

    def begin(self, params: Any) -> tuple[Any, Any, ExchangeState]:
        """g_i, g and the state of the exchange before the first step."""
        g_i, g = self.memory.zeros(params), self.memory.zeros(params)
        return g_i, g, self.exchange.init(self.memory.read(g))

    def follow(
        self,
        target: Any,
        estimate: Any,
        mean: Any,
        state: ExchangeState,
        *,
        share: Array | None = None,
        present: Array | None = None,
        later: Callable[[Any, Any], Followed] | None = None,
    ) -> tuple[Any, Any, Followed]:
        """One step, from what :meth:`begin` or the last step stored.

        Args:
          target: what this worker's estimate follows.
          estimate: g_i, in its stored form.
          mean: g, in its stored form.
          state: the exchange's state.
          share: this worker's weight in the mean (None: one).
          present: 1 if this worker takes part in this step, else 0 (None: it does).
          later: replaces :func:`track` after the first step; a function of g_i and g.

        Returns:
          The next g_i and g, and what to store: both of them and the state of the exchange.
        """
        g_i, g = self.memory.read((estimate, mean))

        def ordinary() -> Followed:
            if later is not None:
                return later(g_i, g)
            return track(self.exchange, target, g_i, g, state, share=share, present=present)

        g_i, g, sent = start(
            self.init, self.exchange, target, g_i, g, state, ordinary, share=share, present=present
        )
        return g_i, g, self.keep(g_i, g, sent, estimate, mean)

    def keep(self, g_i: Any, g: Any, sent: ExchangeState, estimate: Any, mean: Any) -> Followed:
        """The stored form of the next g_i and g, which replaces ``estimate`` and ``mean``."""
        estimate = self.memory.write(g_i, estimate, sent.step)
        return estimate, self.memory.write(g, mean, sent.step, shared=True), sent


def track(
    exchange: Exchange,
    target: Any,
    estimate: Any,
    mean: Any,
    state: ExchangeState,
    *,
    share: Array | None = None,
    present: Array | None = None,
) -> Followed:
    """``c_i = C(target_i - g_i)``; ``g_i <- g_i + c_i``; ``g <- g + mean_i c_i``.

    Args:
      exchange: how the differences travel.
      target: what this worker's estimate follows.
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
    later: Callable[[], Followed],
    *,
    share: Array | None = None,
    present: Array | None = None,
) -> Followed:
    """``later()``, but with another first step if ``init`` asks for one.

    ``"compressed"`` starts from ``g_i = 0``, so that ``g_i^0 = C(target)``. ``"full"`` sends the
    first target uncompressed. ``"zero"`` keeps ``g_i^0 = 0`` and sends only one number, which shows
    whether all values are finite. The other arguments and the result are those of :func:`track`.
    """

    def full() -> Followed:
        dense = Exchange(Identity(), exchange.axis_name, estimates=exchange.estimates)
        bare = state._replace(codec=())
        own, aggregate, after = track(
            dense, target, estimate, mean, bare, share=share, present=present
        )
        return own, aggregate, after._replace(codec=state.codec)

    def zero() -> Followed:
        _, after = silent(exchange, target, state._replace(codec=()))
        return estimate, mean, after._replace(codec=state.codec)

    if init == "compressed":
        return later()
    return first_step(exchange, state, full if init == "full" else zero, later)


def _product(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b.astype(a.dtype)
