"""What the contraction alpha of a compressor becomes inside the analyses."""

from __future__ import annotations

import math

from ef_optax.theory import _check


def theta(alpha: float) -> float:
    """How much of the distortion an EF21 round removes: ``theta = 1 - sqrt(1 - alpha)``.

    Args:
      alpha: contraction, ``E||C(x) - x||^2 <= (1 - alpha)||x||^2``, in (0, 1].

    Returns:
      theta in (0, 1], computed without cancellation for small alpha.

    Raises:
      ValueError: if ``alpha`` is not in (0, 1].

    Example:
      >>> theta(0.75)
      0.5

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    a = _check.contraction("alpha", alpha)
    return a / (1 + math.sqrt(1 - a))


def beta(alpha: float) -> float:
    """How much new drift an EF21 round lets in: ``beta = (1 - alpha)/(1 - sqrt(1 - alpha))``.

    Args:
      alpha: contraction in (0, 1].

    Returns:
      beta >= 0.

    Raises:
      ValueError: if ``alpha`` is not in (0, 1].

    Example:
      >>> beta(0.75)
      0.5

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    a = _check.contraction("alpha", alpha)
    return (1 - a) / theta(a)


def xi(alpha: float) -> float:
    """The price of compression in EF21's step: ``xi = sqrt(beta/theta)``.

    It is computed as ``(1 + sqrt(1 - alpha))/alpha - 1``, which does not cancel. It is 0 without
    compression, 1 at alpha = 0.75, and about ``2/alpha`` for strong compression.

    Args:
      alpha: contraction in (0, 1].

    Returns:
      xi >= 0, at most ``2/alpha - 1``.

    Raises:
      ValueError: if ``alpha`` is not in (0, 1].

    Example:
      >>> xi(1.0), xi(0.75), round(xi(0.01), 12)
      (0.0, 1.0, 198.498743710662)

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    a = _check.contraction("alpha", alpha)
    return (1 + math.sqrt(1 - a)) / a - 1


def damped_contraction(alpha: float, momentum: float) -> float:
    """Contraction of the damped compressor ``v -> C((1 - momentum) v)`` of ``ef_momentum``.

    ``1 - (momentum + (1 - momentum) sqrt(1 - alpha))^2``, by the triangle inequality.

    Args:
      alpha: contraction of C in (0, 1].
      momentum: the averaging constant in [0, 1).

    Returns:
      The contraction of the damped compressor, in (0, 1].

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> round(damped_contraction(1.0, 0.9), 12)
      0.19
    """
    a = _check.contraction("alpha", alpha)
    b = _check.fraction("momentum", momentum)
    # 1 - s^2 = (1 - s)(1 + s) with 1 - s = (1 - b) theta: no cancellation for small alpha.
    gap = (1 - b) * theta(a)
    return gap * (2 - gap)


def repeated_contraction(alpha: float, rounds: int) -> float:
    """Contraction of R compressions, each of what the last ones left out: ``1 - (1 - alpha)^R``.

    Args:
      alpha: contraction of one compression in (0, 1].
      rounds: R >= 1.

    Returns:
      The contraction of the result.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> repeated_contraction(0.5, 3)
      0.875

    References:
      Huang et al., "Lower Bounds and Nearly Optimal Algorithms in Distributed Learning with
      Communication Compression", 2022 (fast compressed communication).
    """
    a, R = _check.contraction("alpha", alpha), _check.count("rounds", rounds)
    return 1.0 if a == 1 else -math.expm1(R * math.log1p(-a))
