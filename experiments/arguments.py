"""Values of flags: lists of methods, numbers and rates, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence


class UsageError(Exception):
    """An error that the user can fix; shown as one line."""


def parse_methods(names: list[str], known: Sequence[str]) -> list[str]:
    """The methods to compare, out of those that are known."""
    for name in names:
        if name not in known:
            raise UsageError(f"--methods: {name!r} is unknown; choose from {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise UsageError("--methods must name at least one method, none of them twice")
    return list(names)


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
    """The learning rate of every method, from method=rate items with methods that are known."""
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
        if method not in rates:
            raise UsageError(
                f"--lr: no learning rate for {method}; add {method}=RATE, take a preset "
                "(--flagfile=experiments/presets/demo.flags) or find rates with --tune"
            )
    return {method: rates[method] for method in methods}
