"""How Optax transformations are made from their two functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from ef_optax._exchange import monitored
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._numeric import trees
from ef_optax._rules import misfits, resting


def as_transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation from its two functions, whose state may be of any class.

    Optax types the state of an update as a union of pytrees, and a function that names its own
    State class does not match it. The type is lost here and nowhere else.

    If the state has monitored exchanges (:func:`ef_optax.monitor`), they also get the norms of the
    rule's gradient, which an exchange does not know. Memories on the host are on the device while
    the functions run.
    """

    def init(params: Any) -> Any:
        return resting.begun(init_fn, params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates = jax.tree.map(misfits.as_array, updates)
        misfits.check_shapes(updates, params)

        def run(state: Any) -> tuple[Any, Any]:
            try:
                emitted, after = update_fn(updates, state, params, **extra_args)
            except (AttributeError, TypeError, ValueError) as error:
                misfits.explain(init_fn, updates, state, error)
                raise
            misfits.check_results(init_fn, (updates, state), (emitted, after))
            return emitted, _with_gradient(after, updates)

        return resting.stepped(run, state)

    return optax.GradientTransformationExtraArgs(init, update)


def plus(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The updates plus what a transformation makes of them: ``u + tx(u)``.

    Example:
      >>> import jax.numpy as jnp
      >>> both = plus(optax.trace(0.5))  # u + m with m = 0.5 m + u
      >>> both.update(jnp.ones(1), both.init(jnp.zeros(1)))[0].tolist()
      [2.0]
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        made, state = inner.update(updates, state, params, **extra_args)
        return trees.add(updates, made), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _with_gradient(state: Any, gradient: Any) -> Any:
    def noted(x: Any) -> Any:
        if not (_is_exchange(x) and x.monitor):
            return x
        return x._replace(monitor=monitored.with_gradient(x.monitor, gradient, x.step))

    exchanges = jax.tree.leaves(state, is_leaf=_is_exchange)
    if not any(_is_exchange(x) and x.monitor for x in exchanges):
        return state
    return jax.tree.map(noted, state, is_leaf=_is_exchange)


def _is_exchange(x: Any) -> bool:
    return isinstance(x, ExchangeState)
