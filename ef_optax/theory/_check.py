"""Argument checks of the theory functions; each returns the checked number."""

from __future__ import annotations

import math
from typing import Any

from ef_optax._numeric import check


def positive(option: str, value: Any) -> float:
    """Returns ``value`` if it is a finite number above zero."""
    check.number("theory", option, value, lambda x: 0 < x < math.inf, "finite and positive")
    return float(value)


def non_negative(option: str, value: Any) -> float:
    """Returns ``value`` if it is a finite number not below zero."""
    check.number("theory", option, value, lambda x: 0 <= x < math.inf, "finite and at least 0")
    return float(value)


def contraction(option: str, value: Any) -> float:
    """Returns ``value`` if it is in (0, 1]; 1 is no compression, and 0 would send nothing."""
    what = (
        "in (0, 1]: 1 is no compression; for an unbiased compressor of variance omega, scaled by "
        "1/(1 + omega), use 1/(1 + omega)"
    )
    check.number("theory", option, value, lambda x: 0 < x <= 1, what)
    return float(value)


def fraction(option: str, value: Any) -> float:
    """Returns ``value`` if it is in [0, 1): a decay or retention factor."""
    check.number("theory", option, value, lambda x: 0 <= x < 1, "in [0, 1)")
    return float(value)


def count(option: str, value: Any) -> int:
    """Returns ``value`` if it is a whole number of at least 1."""
    check.count("theory", option, value)
    return value
