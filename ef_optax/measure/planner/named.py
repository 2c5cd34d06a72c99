"""Methods of a plan from expressions, such as ``error_feedback(top_k(0.01)) | adamw(3e-4)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.compressor import Compressor
from ef_optax.expressions import Call, Expression, parse_list
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.measure.planner.methods import AXIS, Method


def named(text: str, also: Mapping[str, Callable[..., Any]] | None = None) -> tuple[Method, ...]:
    """The methods that expressions describe, for :func:`plan`.

    What is sent is the first compressor of an expression, with its transport (dense in one
    all-reduce if there is none), and the period is that of its local steps. State is that of the
    part that holds the compressor: an optimizer after a bar is not counted, one inside of local
    steps is.

    Args:
      text: expressions, separated by commas, as :func:`ef_optax.expressions.parse_list` reads them.
      also: further functions by name, as there.

    Raises:
      TypeError, ValueError: as there, or for an expression that makes no transformation.

    Example:
      >>> text = "error_feedback(top_k(0.01)) | adamw(3e-4), local.diloco(sgd(1), 15)"
      >>> for method in named(text):
      ...     print(method.name, method.period)
      error_feedback(top_k(0.01)) | adamw(0.0003) 1
      local.diloco(sgd(1), 15) 15
    """
    return tuple(_method(expression) for expression in parse_list(text, also))


def _method(expression: Expression) -> Method:
    if isinstance(expression.build(AXIS), Compressor):
        raise ValueError(
            f"methods={str(expression)!r} is a compressor; plan error_feedback({expression})."
        )
    name, period = str(expression), period_of(expression)
    holding = [part for part in expression.parts if _compressor(part) is not None]
    if not holding and period == 1:
        return Method(name, identity(), compressed_mean)
    part = holding[0] if holding else expression.parts[0]
    rule = lambda _, *, axis_name: part.build(axis_name)  # noqa: E731
    return Method(name, _compressor(part) or identity(), rule, period)


def _compressor(part: Call) -> Compressor | None:
    made = (call.build(AXIS) for call in Expression((part,)).calls())
    return next((x for x in made if isinstance(x, Compressor)), None)


def period_of(expression: Expression) -> int:
    """Steps between two exchanges, if the expression makes local steps; else 1.

    >>> from ef_optax.expressions import parse
    >>> [period_of(parse(text)) for text in ("local.diloco(sgd(1), 15)", "recipes.muloco(0.1)")]
    [15, 30]
    """
    for call in expression.calls():
        parameters = inspect.signature(call.function).parameters
        rules = call.function.__module__.startswith(("ef_optax.local", "ef_optax.recipes"))
        if rules and "period" in parameters:
            given = {**dict(zip(parameters, call.args, strict=False)), **dict(call.kwargs)}
            return int(given.get("period", parameters["period"].default))
    return 1
