"""A measured contraction that is held, by the cheapest level that reaches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from ef_optax.extend import Array, Compressor, Controlled, Controller, check


class Known(NamedTuple):
    """What is known of each level."""

    contraction: Array  # float32 (levels,): as last measured; 1 before
    age: Array  # int32 (levels,): decisions since then


@dataclasses.dataclass(frozen=True)
class HoldContraction(Controller):
    """A level up if the last window was below alpha, a level down if that one may be enough."""

    alpha: float
    window: int
    retry: int
    measures: ClassVar[bool] = True

    def begin(self, costs: Sequence[int]) -> tuple[int, Known]:
        if list(costs) != sorted(costs):
            raise ValueError(
                f"hold_contraction: compressors take {list(costs)} bytes a step; order them from "
                "the cheapest to the dearest."
            )
        levels = len(costs)
        return levels - 1, Known(jnp.ones(levels, jnp.float32), jnp.zeros(levels, jnp.int32))

    def decide(
        self, level: Array, memory: Known, costs: Sequence[int], contraction: Array
    ) -> tuple[Array, Known]:
        now = jnp.arange(len(costs), dtype=jnp.int32) == level
        known = Known(
            jnp.where(now, contraction, memory.contraction), jnp.where(now, 0, memory.age + 1)
        )
        enough = (known.contraction >= self.alpha) | (known.age >= self.retry)
        up, down = jnp.minimum(level + 1, len(costs) - 1), jnp.maximum(level - 1, 0)
        holds = contraction >= self.alpha
        chosen = jnp.where(holds, jnp.where(enough[down], down, level), up)
        return chosen.astype(jnp.int32), known


def hold_contraction(
    compressors: Sequence[Compressor], alpha: float, *, window: int = 10, retry: int = 10
) -> Compressor:
    r"""The cheapest level whose measured contraction is at least a given one, as a run goes.

    .. math:: \hat\alpha = 1 - \frac{\sum \|x - C(x)\|^2}{\sum \|x\|^2}

    The sums are over all leaves, all workers and the exchanges of a window. Below ``alpha`` the
    next window has the next dearer level, and at the dearest one it stays. At ``alpha`` or above,
    the next window has the next cheaper level, unless that one was measured below ``alpha`` within
    the last ``retry`` decisions. A run begins with the dearest level.

    So compression is strong where the gradient has few large values and weak where it has many. The
    x of error feedback has the residual in it, which grows while a level is too cheap. For the
    level of each leaf, from measured gradients on the host, see :func:`with_contraction`.

    Args:
      compressors: the levels, each for all leaves, from the cheapest to the dearest, such as
        ``[ef.top_k(r) for r in (0.001, 0.01, 0.1)]``. All are exchanges of one compiled program.
      alpha: the contraction to be held, in (0, 1].
      window: exchanges between two decisions.
      retry: decisions after which a level that was measured below ``alpha`` is tried again.

    Returns:
      The compressor, which must be the outermost one. Its bits are those of its dearest level. The
      level of the next step is ``exchange.control.level`` in the state of the rule.

    Raises:
      ValueError: for an option out of range; at init, if the compressors are in another order, or
        if the result is inside another policy.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> levels = [ef.top_k(k=k) for k in (1, 2, 4)]
      >>> hold = ef.policies.hold_contraction(levels, 0.6, window=1)
      >>> tx, sent = ef.error_feedback(hold), []
      >>> x = jnp.array([8.0, 1.0, 1.0, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(6):
      ...     updates, state = tx.update(x, state)
      ...     sent.append(int((updates != 0).sum()))
      >>> sent  # one value of four is enough until the residual has grown
      [4, 2, 1, 1, 1, 1]

    References:
      Derived from the contraction of Karimireddy et al. 2019, which is measured here.
    """
    check.static("hold_contraction", "alpha", alpha, lambda x: 0 < x <= 1, "a number in (0, 1]")
    check.count("hold_contraction", "window", window)
    check.count("hold_contraction", "retry", retry)
    return Compressor(Controlled.of(compressors, HoldContraction(alpha, window, retry)))
