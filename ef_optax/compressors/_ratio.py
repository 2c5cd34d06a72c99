"""How many entries are kept, given as a ratio or as a number."""

from __future__ import annotations

import fractions
import math
from typing import Any

from ef_optax._numeric import check


def resolve_k(ratio: float | None, k: int | None, size: int) -> int:
    """How many of ``size`` values are kept.

    It is ``min(d, max(1, ceil(ratio d)))``, computed exactly from the decimal digits of the ratio
    (0.07 of 100 is 7, not 8), and 0 for an empty leaf.

    >>> resolve_k(0.07, None, 100), resolve_k(None, 5, 3), resolve_k(0.01, None, 0)
    (7, 3, 0)
    """
    if k is None:
        assert ratio is not None
        k = max(1, math.ceil(fractions.Fraction(str(ratio)) * size))
    return min(size, k)


def check_ratio_or_k(name: str, ratio: Any, k: Any) -> None:
    """Refuses anything but exactly one of a ratio in (0, 1] and a positive integer k."""
    if (ratio is None) == (k is None):
        raise ValueError(
            f"{name}: ratio={ratio!r}, k={k!r}; give exactly one of them: ratio=0.01 keeps one "
            "value in a hundred, k=10 keeps ten of every leaf."
        )
    if k is None:
        if isinstance(ratio, int) and not isinstance(ratio, bool) and ratio > 1:
            raise ValueError(
                f"{name}: ratio={ratio} must be a number in (0, 1], kept / total; to keep {ratio} "
                f"values of every leaf, write k={ratio}."
            )
        check.ratio(name, "ratio", ratio)
    else:
        check.count(name, "k", k)
