"""Values of flags: lists of methods, numbers and rates, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ef_optax as ef


class UsageError(Exception):
    """An error that the user can fix; shown as one line."""


class Diverged(UsageError):
    """All workers skip every step, because the loss of one is not finite."""


def parse_methods(
    text: str, known: Sequence[str], also: Mapping[str, Callable[..., Any]] | None = None
) -> list[str]:
    """The methods to compare: known names and expressions of public names, each in one spelling.

    Args:
      text: what --methods says.
      known: the short names.
      also: further functions that an expression may call.
    """

    def short() -> None:
        """Stands for a known name while the text is read; it has no arguments."""

    names_of = dict.fromkeys(known, short) | dict(also or {})
    try:
        found = ef.expressions.parse_list(text, names_of) if text else []
    except ValueError as error:
        raise UsageError(f"--methods: {error} Short names are {', '.join(known)}.") from None
    names = []
    for expression in found:
        used = [call.name for call in expression.calls() if call.function is short]
        if used and len(list(expression.calls())) > 1:
            raise UsageError(
                f"--methods: {expression}: the short name {used[0]} cannot be a part of it; "
                f"{used[0]}() is a function if there is one"
            )
        names += used or [str(expression)]
    if not names or len(set(names)) < len(names):
        raise UsageError("--methods must name at least one method, none of them twice")
    return names


def parse_floats(flag: str, texts: list[str]) -> list[float]:
    """A list of positive numbers."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        raise UsageError(f"--{flag}={','.join(texts)}: not a list of numbers") from None
    if not all(0 < value < math.inf for value in values):
        raise UsageError(f"--{flag}={','.join(texts)}: every number must be positive")
    return values


def parse_rates(items: list[str], methods: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """The learning rate of every method, from method=rate items with methods that are known.

    An expression has its own rates, which are multiplied by 1.
    """
    rates = {}
    for item in items:
        method, _, text = item.partition("=")
        if method not in known:
            raise UsageError(f"--lr: {item!r} is not method=rate with a method of {known}")
        try:
            rates[method] = float(text)
        except ValueError:
            rates[method] = math.nan
        if not 0 < rates[method] < math.inf:
            raise UsageError(f"--lr: {item!r} is not method=rate with a positive number")
    for method in methods:
        if method not in known:
            rates[method] = 1.0
        if method not in rates:
            raise UsageError(
                f"--lr: no learning rate for {method}; add {method}=RATE, take a preset "
                "(--flagfile=experiments/presets/demo.flags) or find rates with --tune"
            )
    return {method: rates[method] for method in methods}
