"""What the jobs must know of a method that is an expression: is it an optimizer, what is sent."""

from __future__ import annotations

import inspect

import ef_optax as ef
from experiments.arguments import UsageError
from experiments.workers import AXIS


def check(expression: ef.expressions.Expression) -> None:
    """Refuses what cannot be an optimizer, before anything is computed.

    Raises:
      UsageError: with the remedy.
    """
    try:
        made = expression.build(AXIS)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--methods: {expression}: {error}") from None
    if isinstance(made, ef.Compressor):
        raise UsageError(
            f"--methods: {expression} is a compressor; write error_feedback({expression}) | "
            "sgd(0.1)"
        )
    if not takes_steps(expression):
        raise UsageError(
            f"--methods: {expression} has no learning rate; write {expression} | sgd(0.1)"
        )


def takes_steps(expression: ef.expressions.Expression) -> bool:
    """Whether a part of it has a learning rate, so that its updates are steps."""
    return any(_has_a_rate(call) for call in expression.calls())


def _has_a_rate(call: ef.expressions.Call) -> bool:
    """Whether this makes steps of gradients; an optional rate of a rule only says its units."""
    parameters = inspect.signature(call.function).parameters
    rate = parameters.get("learning_rate", parameters.get("step_size"))
    of_a_rule = call.function.__module__.startswith("ef_optax.feedback")
    return rate is not None and not (of_a_rule and rate.default is not rate.empty)


def compressor(expression: ef.expressions.Expression) -> ef.Compressor:
    """The first compressor in an expression: what its messages are like."""
    made = (call.build(AXIS) for call in expression.calls())
    return next((x for x in made if isinstance(x, ef.Compressor)), ef.identity())
