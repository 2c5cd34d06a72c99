"""Dense steps that leave the memory of a rule alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.extend import (
    Array,
    AxisName,
    Exchange,
    ExchangeState,
    Identity,
    as_transformation,
    check,
    collectives,
    trees,
)


class DenseStepsState(NamedTuple):
    """State of :func:`dense_steps`."""

    step: Array  # int32 scalar: steps made
    rule: Any  # the state of the rule
    dense: ExchangeState


def dense_steps(
    rule: optax.GradientTransformation,
    when: Callable[[Array], Array],
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes the exact mean in some steps, in which the rule neither sends nor remembers anything.

    It differs from :func:`flush`, whose dense steps send the residual too: here the residual waits,
    and its rule does not see the gradient of a dense step. So what is sent densely may be used for
    something that must be exact, such as Adam's variance in :func:`ef_optax.recipes.zero_one_adam`.

    Args:
      rule: a rule that gives the mean gradient, or a chain with one.
      when: from the number of the step, an int32 scalar that begins at 0, whether it is dense.
      axis_name: the rule's worker axis (or a tuple of axes); None for one worker.

    Returns:
      The transformation; its state is a :class:`DenseStepsState`. Only one of the two exchanges
      runs in a step.

    Raises:
      TypeError: if ``rule`` is not an Optax transformation, or ``when`` not a function.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> rule = ef.error_feedback(ef.top_k(k=1))
      >>> tx = ef.policies.dense_steps(rule, lambda step: step % 2 == 1)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([3.0, 2.0]), state)
      ...     print(updates.tolist(), state.rule.residual.tolist())
      [3.0, 0.0] [0.0, 2.0]
      [3.0, 2.0] [0.0, 2.0]
    """
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(f"dense_steps: rule={rule!r} is not an Optax transformation.")
    if not callable(when):
        raise TypeError(f"dense_steps: when={when!r} must be a function of the step.")
    check.axis(axis_name)
    rule, exchange = optax.with_extra_args_support(rule), Exchange(Identity(), axis_name)

    def init_fn(params: Any) -> DenseStepsState:
        return DenseStepsState(
            step=jnp.zeros((), jnp.int32),
            rule=rule.init(params),
            dense=exchange.init(trees.wide(params)),
        )

    def update_fn(
        updates: Any, state: DenseStepsState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DenseStepsState]:
        def exact() -> tuple[Any, Any, ExchangeState]:
            out = exchange(trees.wide(updates), state.dense)
            return trees.emit(out.aggregate, updates), state.rule, out.state

        def ordinary() -> tuple[Any, Any, ExchangeState]:
            made, after = rule.update(updates, state.rule, params, **extra_args)
            return made, after, state.dense

        made, after, sent = collectives.agreed_cond(
            when(state.step), exact, ordinary, axis=axis_name
        )
        return made, DenseStepsState(state.step + 1, after, sent)

    return as_transformation(init_fn, update_fn)
