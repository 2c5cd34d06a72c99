"""When error feedback pays, as far as the bounds can tell."""

from __future__ import annotations

from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness


def communication_gain(
    constants: Smoothness, learning_rate: float, compression_factor: float
) -> float:
    """How many times fewer bits the compressed method needs than gradient descent, by the bounds.

    Both bounds have the leading term ``2 (f(x^0) - f*)/(gamma T)``, with ``gamma = 1/L`` for
    gradient descent, so the ratio of the rounds is ``1/(L gamma)`` and that of the bits
    ``compression_factor L gamma``. Above 1 compression pays *by the bound*. For EF21 with a
    sparsifier the gain tends to ``L/(2 L_AM)``, at most about a half, however strong the
    compression. So the worst case promises nothing, unless features are rare: then the gain is
    ``sqrt(n/c)`` times larger, or more. Measured problems do far better than their worst case.

    Args:
      constants: smoothness constants of the problem.
      learning_rate: step of the compressed method, e.g. :func:`ef21_step` or
        :func:`rare_features_step`.
      compression_factor: dense bits over the message's bits, indices and scales included.

    Returns:
      The gain; compression pays if it is above 1.

    Raises:
      ValueError: if an argument is not positive.

    Example:
      >>> from ef_optax.theory import ef21_step, rare_features_step
      >>> c = Smoothness(L=1.0, L_i=(1.0,) * 100)
      >>> f"{communication_gain(c, ef21_step(c, 0.01), 100):.2f}"
      '0.50'
      >>> f"{communication_gain(c, rare_features_step(c, 0.01, shared_by=5), 100):.2f}"
      '9.15'

    References:
      Derived from Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    gamma = _check.positive("learning_rate", learning_rate)
    return _check.positive("compression_factor", compression_factor) * constants.L * gamma


def delay_rounds(delta: float, L: float, second_moment: float, initial_gap: float) -> float:
    """Steps after which the compression term of EF14's bound is no larger than the terms of SGD.

    In Theorem II at ``gamma = 1/sqrt(T+1)`` the compression term, which falls like 1/T, equals the
    terms of SGD at ``T + 1 = (8 L^2 s2 (1 - delta)/(delta^2 (4 f0 + L s2)))^2``. Much later than
    that, compression with error feedback is free; much earlier it dominates.

    Args:
      delta: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      second_moment: s2 with ``E||g_t||^2 <= s2``.
      initial_gap: ``f0 = f(x_0) - f*``.

    Returns:
      The number of steps, 0 without compression.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> round(delay_rounds(0.5, L=1.0, second_moment=1.0, initial_gap=1.0), 9)
      10.24

    References:
      Derived from Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019,
      Theorem II.
    """
    d = _check.contraction("delta", delta)
    _check.positive("L", L)
    s2 = _check.positive("second_moment", second_moment)
    f0 = _check.non_negative("initial_gap", initial_gap)
    return (8 * L**2 * s2 * (1 - d) / (d**2 * (4 * f0 + L * s2))) ** 2
