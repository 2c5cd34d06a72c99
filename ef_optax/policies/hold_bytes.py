"""A number of bytes a step that is held on average, by levels that take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ef_optax.extend import Array, Compressor, Controlled, Controller, check

_LARGEST = 1 << 30
"""Credit is an int32; larger numbers of bytes are counted in larger units."""


@dataclasses.dataclass(frozen=True)
class HoldBytes(Controller):
    """The dearest level for which the credit is enough; every window adds the budget to it."""

    budget: int
    window: int

    def begin(self, costs: Sequence[int]) -> tuple[Array, Array]:
        if self.budget < min(costs):
            raise ValueError(
                f"hold_bytes: budget={self.budget} is too small: the cheapest level takes "
                f"{min(costs)} bytes a step; give more bytes or a stronger level."
            )
        budget, prices = self._in_units(costs)
        return _choice(jnp.asarray(budget, jnp.int32), prices)

    def decide(
        self, level: Array, memory: Array, costs: Sequence[int], contraction: Any
    ) -> tuple[Array, Array]:
        del level, contraction
        budget, prices = self._in_units(costs)
        return _choice(jnp.minimum(memory, max(prices)) + budget, prices)

    def _in_units(self, costs: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """The budget and the costs of a window, rounded so that no more is sent."""
        unit = -(-self.window * max(*costs, self.budget) // _LARGEST)
        return (
            self.window * self.budget // unit,
            tuple(-(-self.window * cost // unit) for cost in costs),
        )


def _choice(credit: Array, prices: Sequence[int]) -> tuple[Array, Array]:
    """The dearest level that the credit pays for, and what is left of it.

    The budget pays for the cheapest level, but perhaps not in units that were rounded.
    """
    price = jnp.asarray(prices, jnp.int32)
    paid = (price <= credit) | (price == min(prices))
    level = jnp.argmax(jnp.where(paid, price, -1)).astype(jnp.int32)
    return level, credit - price[level]


def hold_bytes(compressors: Sequence[Compressor], budget: int, *, window: int = 1) -> Compressor:
    r"""Holds the bytes that a worker sends in a step on average, between those of given levels.

    .. math:: \text{credit} \leftarrow \min(\text{credit},\ \max_j b_j) + B, \qquad
              \text{level} = \arg\max \{b_j : b_j \le \text{credit}\}, \qquad
              \text{credit} \leftarrow \text{credit} - b_{\text{level}}

    The levels are exchanges of one compiled program. Whatever their sizes, T steps send at most T B
    bytes, and all but the credit of them. A budget of exactly one level's bytes is that level; one
    between two levels lets them take turns. The decision needs no communication. It works in every
    rule; for the level of each leaf within a number of bytes see :func:`within_bytes`, whose
    compressors can be levels here.

    Args:
      compressors: the levels, each for all leaves, in any order; small leaves may be dense in each
        of them by :func:`ef_optax.per_leaf`.
      budget: B, bytes of one worker's message in a step, at least those of the cheapest level.
      window: exchanges between two decisions, for which the level stays.

    Returns:
      The compressor, which must be the outermost one. Its bits are those of its dearest level. The
      level of the next step is ``exchange.control.level`` in the state of the rule.

    Raises:
      ValueError: for a budget or a window below 1; at init, if no level is that cheap, or if the
        compressor is inside another policy.

    Example:
      Levels of 5 and 32 bytes take turns so that a step has at most 16 on average:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> levels = [ef.top_k(k=1), ef.identity()]
      >>> tx = ef.error_feedback(ef.policies.hold_bytes(levels, 16))
      >>> x, sent = jnp.arange(1.0, 9.0), []
      >>> state = tx.init(x)
      >>> for _ in range(6):
      ...     updates, state = tx.update(x, state)
      ...     sent.append(int((updates != 0).sum()))
      >>> sent
      [1, 1, 8, 1, 8, 1]

    References:
      A token bucket, as in the shaping of network traffic.
    """
    check.count("hold_bytes", "budget", budget)
    check.count("hold_bytes", "window", window)
    return Compressor(Controlled.of(compressors, HoldBytes(budget, window)))
