"""Argument checks shared by the theory functions: the name, the value, the remedy."""

from __future__ import annotations

import math
from typing import Any

from ef_optax._numeric.check import is_number


def positive(name: str, value: Any) -> float:
    """Returns ``value`` if it is a finite number above zero."""
    if not (is_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be finite and positive.")
    return float(value)


def non_negative(name: str, value: Any) -> float:
    """Returns ``value`` if it is a finite number not below zero."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must be finite and at least 0.")
    return float(value)


def contraction(name: str, value: Any) -> float:
    """Returns ``value`` if it is in (0, 1]: 1 is no compression, 0 would send nothing."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(
            f"{name}={value!r} must be in (0, 1]: 1 is no compression; for an unbiased compressor "
            "of variance omega, scaled by 1/(1 + omega), use 1/(1 + omega)."
        )
    return float(value)


def fraction(name: str, value: Any) -> float:
    """Returns ``value`` if it is in [0, 1): a decay or retention factor."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}={value!r} must be in [0, 1).")
    return float(value)


def count(name: str, value: Any) -> int:
    """Returns ``value`` if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value
