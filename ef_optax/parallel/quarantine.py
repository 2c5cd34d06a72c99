"""A bad step does no harm: all workers skip it together, and every state stays as it was.

A step is bad if some number is not finite, or if a gradient is so large that what a rule remembers
of it could overflow later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._core import context
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite, all_of
from ef_optax._rules import resting


def _is_exchange(x: Any) -> bool:
    return isinstance(x, ExchangeState)


def exchange_states(state: Any) -> list[ExchangeState]:
    """All exchange states inside the state of a chain, in order.

    >>> import ef_optax as ef, jax.numpy as jnp
    >>> tx = ef.error_feedback(ef.top_k(0.5))
    >>> [int(x.skipped) for x in exchange_states(tx.init(jnp.zeros(3)))]
    [0]
    """
    return [x for x in jax.tree.leaves(state, is_leaf=_is_exchange) if _is_exchange(x)]


def each_gradient(name: str, value: Any) -> list[Any]:
    """The gradients in a per-worker argument: ``grads`` has one for each query point."""
    return list(value.values()) if name == "grads" and isinstance(value, Mapping) else [value]


def watched(lift: context.Lift, *gradients: Any, axis: coll.AxisName = None) -> context.Lift:
    """A copy of the lift that knows whether these gradients of one worker are accepted.

    A tree is accepted if its squared norm is finite, that is, for a norm up to 1.8e19 in float32.
    A rule remembers sums, differences and multiples of such gradients, which are far from
    overflowing. A memory of 3e38 would be finite too, but its difference to the next gradient may
    overflow, or the mean of such differences, and then every later step is skipped.
    """
    local = not lift.axis_sizes
    good = [all_finite(jax.tree.leaves(g), local=local, squares=True) for g in gradients]
    return dataclasses.replace(lift, accepted=all_of(good), axes=coll.axis_names(axis))


def keep_if_bad(
    updates: Any,
    new: Any,
    old: Any,
    axis: coll.AxisName = None,
    *,
    accepted: Array | None = None,
    local: bool = False,
) -> tuple[Any, Any]:
    """Zero updates and the old state if any exchange received or emitted a non-finite number.

    An exchange that was not used in this step (its rule sends every few steps) has an old flag,
    which is ignored. In a skipped step, only the flags and the counter of skipped steps are new.

    Several exchanges over parts of a tuple ``axis`` may have different flags on different workers,
    and their messages do not carry ``accepted``. One more sum over ``axis`` then makes all workers
    decide alike.

    Args:
      updates: the updates after the chain.
      new: the state after the step.
      old: the state before the step.
      axis: the worker axis, or a tuple of axes.
      accepted: whether this worker's gradients are accepted (see :func:`watched`).
      local: whether no leaf is split over other axes.
    """
    pairs = zip(exchange_states(new), exchange_states(old), strict=True)
    flags = [after.ok | (after.step == before.step) for after, before in pairs]
    # Finite inputs may overflow in the mean, or after it.
    flags.append(all_finite(jax.tree.leaves(updates), local=local))
    ok = jnp.all(jnp.stack(flags))
    if len(flags) > 2 and len(coll.axis_names(axis)) > 1:
        ok = ok if accepted is None else ok & accepted
        ok = coll.psum(jnp.where(ok, 0, 1).astype(jnp.int32), axis) == 0

    def choose(b: Any, a: Any) -> Any:
        if b is a:
            return a
        # For each leaf one equation, where jnp.where has a function with three.
        equal = jnp.result_type(b) == jnp.result_type(a)
        return jax.lax.select(ok, b, a) if equal else jnp.where(ok, b, a)

    def pick(b: Any, a: Any) -> Any:
        if not _is_exchange(b):
            return choose(b, a)
        kept = jax.tree.map(choose, b, a)
        return kept._replace(skipped=a.skipped + jnp.where(ok, 0, 1).astype(jnp.int32), ok=ok)

    updates = jax.tree.map(lambda u: choose(u, jnp.zeros_like(u)), updates)
    return updates, jax.tree.map(pick, new, old, is_leaf=_is_exchange)


def guard(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips a step on all workers if any worker's gradient is bad, for hand-written maps.

    A gradient is bad if it has a NaN or an infinity, or a norm above 1.8e19 (the square root of the
    largest float32), after which a memory could overflow. :func:`data_parallel` and
    :func:`simulate` do this themselves. Without a guard, a non-finite gradient makes every entry of
    an exchange's aggregate NaN. The flag travels with the messages, so the guard itself sends
    nothing.

    Args:
      tx: the chain, including the transformations before and after the exchange.

    Returns:
      The guarded transformation: on a bad step it emits zeros and leaves every leaf of the state
      as it was, except the counter ``ExchangeState.skipped``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.parallel.guard(optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1)))
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), state, jnp.zeros(2))
      >>> updates.tolist(), int(ef.parallel.exchange_states(state)[0].skipped)
      ([0.0, 0.0], 1)
    """
    inner = optax.with_extra_args_support(tx)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        # Not guarded: a bad exchange then emits NaN, which a second tier finds in its input.
        def run(state: Any) -> tuple[Any, Any]:
            lift = context.current() or context.Lift(guarded=False)
            others = each_gradient("grads", extra_args.get("grads", {}))
            with context.lifting(watched(lift, updates, *others)):
                new_updates, new_state = inner.update(updates, state, params, **extra_args)
            return keep_if_bad(new_updates, new_state, state)

        return resting.stepped(run, state)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
