"""Local steps: between two synchronisations every worker moves its own model.

x_i = x + a_i                     the worker's model: the common one, and how far it is ahead
a_i = a_i - eta grad f_i(x_i)     a local step
every H steps                     the workers exchange what they have gone ahead
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._core import context
from ef_optax._exchange import collectives
from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite
from ef_optax._rules import arguments
from ef_optax._rules.memory import Memory


def own_model(rule: str, ahead: Any, params: Any) -> dict[str, Any]:
    """The ``points`` of a rule with local steps: each worker's own model, under the rule's name.

    Args:
      rule: the rule's name; ``"params"`` if it needs no gradient at the common model.
      ahead: a_i, as the rule's state keeps it.
      params: x, what the training loop holds.
    """
    return {rule: trees.emit(trees.add(Memory.read(ahead), params), params)}


def own_gradient(
    rule: str, learning_rate: optax.ScalarOrSchedule, count: Array, extra_args: Any
) -> tuple[Any, Any]:
    """The gradient at the worker's own model, in float32 or wider, and this step's rate.

    Raises:
      ValueError: if the update did not receive the gradients at the query points.
    """
    g = trees.wide(arguments.gradient_at(rule, rule, extra_args))
    return g, arguments.value_at(learning_rate, count)


def descend(x: Any, rate: Any, g: Any) -> Any:
    """``x - rate g``."""
    return jax.tree.map(lambda x, g: x - jnp.asarray(rate, g.dtype) * g, x, g)


def every(
    period: int,
    count: Array,
    synchronise: Callable[[], Any],
    go_on: Callable[[], Any],
    axis_name: AxisName,
) -> Any:
    """``synchronise()`` in every ``period``-th step, else ``go_on()``; only one of them runs.

    Args:
      period: H.
      count: steps made, this one included; the same on all workers.
      synchronise: the step in which the workers exchange how far they have gone ahead.
      go_on: every other step, with results of the same shapes.
      axis_name: the worker axis, or None.
    """
    return collectives.agreed_cond(count % period == 0, synchronise, go_on, axis=axis_name)


def renewed(
    period: int | None,
    count: Array,
    params: Any,
    ahead: Any,
    others: Sequence[Any],
    axis_name: AxisName,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Moves the common model to the mean of the workers' models, which stay where they are.

    Args:
      period: in every how many steps, by one all-reduce of the model; None for never.
      count: steps made, this one included.
      params: x.
      ahead: a_i, in float32 or wider.
      others: further trees that are relative to x, like ``ahead``.
      axis_name: the worker axis, or None.

    Returns:
      The step of x, and ``ahead`` and ``others`` relative to the new x.
    """

    def renew() -> tuple[Any, Any, tuple[Any, ...]]:
        n = collectives.axis_size(axis_name)

        def mean(a: Array, p: Array) -> Array:
            return (collectives.psum(a, axis_name) / jnp.asarray(n, a.dtype)).astype(p.dtype)

        step = jax.tree.map(mean, ahead, params)
        return step, trees.sub(ahead, step), tuple(trees.sub(tree, step) for tree in others)

    def stay() -> tuple[Any, Any, tuple[Any, ...]]:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params), ahead, tuple(others)

    return stay() if period is None else every(period, count, renew, stay, axis_name)


def inner_step(
    inner: optax.GradientTransformationExtraArgs,
    gradient: Any,
    state: Any,
    ahead: Any,
    params: Any,
    extra_args: Any,
) -> tuple[Any, Any]:
    """One local step: how far the worker is ahead after it, and the inner optimizer's next state.

    A step that the worker cannot use (:func:`usable`) changes neither.

    Args:
      inner: the optimizer of the local steps.
      gradient: at the worker's own model.
      state: the inner optimizer's state.
      ahead: a_i, in float32 or wider.
      params: the worker's own model.
      extra_args: further arguments of the update.
    """
    step, after = inner.update(gradient, state, params, **extra_args)
    good = usable(gradient, step)
    choose = lambda new, old: jnp.where(good, new, old)  # noqa: E731
    moved = jax.tree.map(choose, trees.add(ahead, step), ahead)
    return moved, jax.tree.map(choose, after, state)


def usable(*trees: Any) -> Array:
    """Whether a worker can use its own gradient and step, however many others can use theirs.

    It is the criterion by which a lift accepts gradients: a finite norm, up to 1.8e19 in float32.
    """
    lift = context.current()
    local = lift is None or not lift.axis_sizes
    return all_finite(jax.tree.leaves(trees), local=local, squares=True)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Lets exchanges send a drift even if the gradient of this very step was not accepted.

    The lift hands its opinion of the gradients to every exchange. A rule that has left a bad one
    out of the drift (:func:`usable`) puts its exchange under this context.
    """
    lift = context.current()
    if lift is None:
        yield
        return
    with context.lifting(dataclasses.replace(lift, accepted=None)):
        yield
