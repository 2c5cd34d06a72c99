"""Bounds for classic error feedback (EF14), in step units with constant step size."""

from __future__ import annotations

import math

from ef_optax.theory import _check


def ef14_residual_bound(delta: float, learning_rate: float, second_moment: float) -> float:
    """Lemma 3: ``E||e_t||^2 <= 4 (1 - delta) gamma^2 s2/delta^2`` at every step.

    Args:
      delta: contraction of the compressor in (0, 1].
      learning_rate: gamma, constant; the residual is in step units.
      second_moment: s2 with ``E||g_t||^2 <= s2``.

    Returns:
      The bound on the expected squared norm of the residual.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef14_residual_bound(0.5, 0.1, 1.0)
      0.08000000000000002

    References:
      Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019, Lemma 3.
    """
    d = _check.contraction("delta", delta)
    gamma = _check.positive("learning_rate", learning_rate)
    s2 = _check.non_negative("second_moment", second_moment)
    return 4 * (1 - d) * gamma**2 * s2 / d**2


def ef14_bound(
    delta: float,
    L: float,
    second_moment: float,
    initial_gap: float,
    learning_rate: float,
    steps: int,
) -> float:
    """Theorem II: a bound of ``min_{t<=T} E||grad f(x_t)||^2`` for smooth, non-convex f.

    It is ``2 f0/(gamma (T+1)) + gamma L s2/2 + 4 gamma^2 L^2 s2 (1 - delta)/delta^2``. With
    delta = 1 it is the bound of SGD.

    Args:
      delta: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      second_moment: s2 with ``E||g_t||^2 <= s2``.
      initial_gap: ``f0 = f(x_0) - f*``.
      learning_rate: gamma, constant.
      steps: T + 1, the number of iterates.

    Returns:
      The bound on the smallest expected squared gradient norm.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef14_bound(1.0, L=1.0, second_moment=2.0, initial_gap=1.0, learning_rate=0.1, steps=100)
      0.30000000000000004

    References:
      Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019, Theorem II.
    """
    d = _check.contraction("delta", delta)
    _check.positive("L", L)
    s2 = _check.non_negative("second_moment", second_moment)
    f0 = _check.non_negative("initial_gap", initial_gap)
    gamma = _check.positive("learning_rate", learning_rate)
    n = _check.count("steps", steps)
    return 2 * f0 / (gamma * n) + gamma * L * s2 / 2 + 4 * gamma**2 * L**2 * s2 * (1 - d) / d**2


def ef14_tuned_bound(
    delta: float, L: float, second_moment: float, initial_gap: float, steps: int
) -> float:
    """Theorem II at ``gamma = 1/sqrt(T+1)``: the price of compression falls like 1/T.

    ``(4 f0 + L s2)/(2 sqrt(T+1)) + 4 L^2 s2 (1 - delta)/(delta^2 (T+1))``.

    Args:
      delta: contraction of the compressor in (0, 1]; 1/k for an unbiased compressor U with
        ``E||U(x)||^2 <= k||x||^2`` that is sent as U/k (Remark 5).
      L: smoothness constant of f.
      second_moment: s2 with ``E||g_t||^2 <= s2``.
      initial_gap: ``f0 = f(x_0) - f*``.
      steps: T + 1, the number of iterates.

    Returns:
      The bound on the smallest expected squared gradient norm.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef14_tuned_bound(0.5, L=1.0, second_moment=1.0, initial_gap=1.0, steps=100)
      0.33

    References:
      Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD", ICML 2019, Theorem II.
    """
    gamma = 1 / math.sqrt(_check.count("steps", steps))
    return ef14_bound(delta, L, second_moment, initial_gap, gamma, steps)
