"""The tight theory of EF14, EF21 and compressed gradient descent on strongly convex problems.

A method's rate is the factor by which its Lyapunov function shrinks in every step, in the worst
case over all L-smooth, mu-strongly convex functions and all compressors of contraction alpha. No
step size and no other Lyapunov function has a smaller one. With q = sqrt(1 - alpha):

error feedback      V = ||x - e - x*||^2 + ||e||^2/q        x the model, e the residual
EF21                V = ||g - grad f(x)||^2 + q ||grad f(x)||^2        g the estimate
CGD                 V = f(x) - f*                           x = x - gamma C(grad f(x)), no memory

EF14 here is in step units (``error_feedback`` after the learning rate), EF21's first model moves by
the estimate of its first gradient.
"""

from __future__ import annotations

import math

from ef_optax.theory import _check
from ef_optax.theory.contraction import theta


def tight_step(alpha: float, L: float, mu: float) -> float:
    r"""The best constant step of EF14 and of EF21: gradient descent's, times ``(1 - q)/(1 + q)``.

    .. math:: \gamma = \frac{2}{L + \mu} \cdot \frac{1 - q}{1 + q}, \quad q = \sqrt{1 - \alpha}

    It needs exact gradients and one worker in the publication of which the code is public; a later
    one extends the analysis to any number of workers (by its abstract).

    Args:
      alpha: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      mu: constant of strong convexity, in (0, L].

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> tight_step(0.75, L=1.5, mu=0.5), tight_step(1.0, L=1.5, mu=0.5)
      (0.3333333333333333, 1.0)

    References:
      Berg Thomsen, Taylor, Dieuleveut, "Tight analyses of first-order methods with error feedback",
      2025 (arXiv 2506.05271), and its code, DanielBergThomsen/error-feedback-tight:
      theory_helpers.py; for several workers, arXiv 2605.31594 (abstract).
    """
    one_minus_q, q, L, mu = _constants(alpha, L, mu)
    return 2 / (L + mu) * one_minus_q / (1 + q)


def tight_rate(alpha: float, L: float, mu: float) -> float:
    r"""What a step of :func:`tight_step` leaves of the Lyapunov function of EF14 or EF21.

    .. math:: \rho = q + \frac{1 + q}{4} (L - \mu) \lambda, \quad
              \lambda = \frac{\gamma}{L + \mu} \Big[ (1 - q)(L - \mu)
              + (1 + q) \sqrt{(L - \mu)^2 + \tfrac{16 L \mu q}{(1 + q)^2}} \Big]

    Without compression it is ``((L - mu)/(L + mu))^2``, that of gradient descent. It is attained:
    on a quadratic in one dimension with the curvature L or mu, the compressor ``(1 + q) x`` needs
    exactly as many steps. So ``log(1/accuracy)/log(1/rate)`` steps are enough and may be necessary.

    Args:
      alpha: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      mu: constant of strong convexity, in (0, L].

    Returns:
      The factor, in [0, 1).

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> round(tight_rate(0.25, L=1.0, mu=0.1), 5), round(tight_rate(0.1, L=1.0, mu=0.1), 5)
      (0.97422, 0.99047)

    References:
      As for :func:`tight_step`; the rate is that of certificates/EF/theorem1_pepit.ipynb.
    """
    gamma = tight_step(alpha, L, mu)
    one_minus_q, q, L, mu = _constants(alpha, L, mu)
    root = math.sqrt((L - mu) ** 2 + 16 * L * mu * q / (1 + q) ** 2)
    lam = gamma / (L + mu) * (one_minus_q * (L - mu) + (1 + q) * root)
    return q + 0.25 * (1 + q) * (L - mu) * lam


def cgd_step(alpha: float, L: float, mu: float) -> float:
    r"""The best constant step of compressed gradient descent, ``x = x - gamma C(grad f(x))``.

    .. math:: \gamma = \frac{2}{(1 - q)\mu + (1 + q) L}, \quad q = \sqrt{1 - \alpha}

    With one worker it is larger than :func:`tight_step`, and CGD, which remembers nothing, is
    faster in the worst case. With several workers that differ it does not reach the optimum, and
    may diverge; error feedback is for them.

    Args:
      alpha: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      mu: constant of strong convexity, in (0, L].

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> cgd_step(0.75, L=1.0, mu=1.0), cgd_step(1.0, L=1.5, mu=0.5)
      (1.0, 1.0)

    References:
      de Klerk, Glineur, Taylor, "Worst-case convergence analysis of inexact gradient and Newton
      methods through semidefinite programming performance estimation", SIAM J. Optim. 2020, with q
      as the relative error of the gradient.
    """
    one_minus_q, q, L, mu = _constants(alpha, L, mu)
    return 2 / (one_minus_q * mu + (1 + q) * L)


def cgd_rate(alpha: float, L: float, mu: float) -> float:
    r"""How much of ``f(x) - f*`` is left after a step of compressed gradient descent, one worker.

    .. math:: \rho = \Big(\frac{(1 + q) L - (1 - q)\mu}{(1 + q) L + (1 - q)\mu}\Big)^2

    It is attained by the compressors ``(1 + q) x`` at curvature L and ``(1 - q) x`` at mu.

    Args:
      alpha: contraction of the compressor in (0, 1].
      L: smoothness constant of f.
      mu: constant of strong convexity, in (0, L].

    Returns:
      The factor, in [0, 1), never above :func:`tight_rate`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> cgd_rate(0.75, L=1.0, mu=1.0), tight_rate(0.75, L=1.0, mu=1.0)
      (0.25, 0.5)

    References:
      As for :func:`cgd_step`.
    """
    one_minus_q, q, L, mu = _constants(alpha, L, mu)
    most, least = (1 + q) * L, one_minus_q * mu
    return ((most - least) / (most + least)) ** 2


def _constants(alpha: float, L: float, mu: float) -> tuple[float, float, float, float]:
    """``1 - q`` without cancellation, q, L and mu, checked."""
    one_minus_q = theta(alpha)
    L, mu = _check.positive("L", L), _check.positive("mu", mu)
    if mu > L:
        raise ValueError(f"theory: mu={mu!r} must be at most L={L!r}.")
    return one_minus_q, math.sqrt(1 - alpha), L, mu
