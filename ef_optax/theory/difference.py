"""Methods that compress differences: EF-BV, DIANA, MARINA, three-point compressors."""

from __future__ import annotations

import math
from typing import NamedTuple

from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness
from ef_optax.theory.contraction import beta, theta


class EFBVParameters(NamedTuple):
    """EF-BV's scalings and what they do to the error.

    Attributes:
      lam: the step of the control variates h_i.
      nu: the weight of the fresh compressed differences in the gradient estimate.
      r: contraction factor of the h_i, in [0, 1).
      r_av: the same for the average over workers.
    """

    lam: float
    nu: float
    r: float
    r_av: float


def ef_bv_parameters(eta: float, omega: float, omega_av: float | None = None) -> EFBVParameters:
    """The best lambda and nu of EF-BV for a compressor with bias eta and variance omega.

    ``lambda = min{(1-eta)/((1-eta)^2 + omega), 1}``, and nu is the same with ``omega_av``;
    ``r = (1 - lambda + lambda eta)^2 + lambda^2 omega``, and ``r_av`` the same with nu and
    ``omega_av``.

    Args:
      eta: relative bias in [0, 1): ``||E C(x) - x|| <= eta ||x||``. 0 for an unbiased compressor,
        ``sqrt(1 - alpha)`` for a deterministic one.
      omega: relative variance, ``E||C(x) - E C(x)||^2 <= omega ||x||^2``.
      omega_av: the variance of the mean over workers; ``omega/n`` if they draw independently.
        Default ``omega``.

    Returns:
      The parameters.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef_bv_parameters(eta=0.0, omega=3.0, omega_av=0.3).lam
      0.25

    References:
      Condat, Yi, Richtarik, "EF-BV", NeurIPS 2022; formulas as in WilliamYi96/EF-BV.
    """
    eta = _check.fraction("eta", eta)
    omega = _check.non_negative("omega", omega)
    omega_av = omega if omega_av is None else _check.non_negative("omega_av", omega_av)

    def best(variance: float) -> tuple[float, float]:
        a = min((1 - eta) / ((1 - eta) ** 2 + variance), 1.0)
        return a, (1 - a + a * eta) ** 2 + a**2 * variance

    (lam, r), (nu, r_av) = best(omega), best(omega_av)
    return EFBVParameters(lam, nu, r, r_av)


def ef_bv_step(constants: Smoothness, parameters: EFBVParameters) -> float:
    """The step of EF-BV: ``1/(L + L_QM sqrt(r_av/r)/s)`` with ``s = sqrt((1+r)/(2r)) - 1``.

    Args:
      constants: smoothness constants of the problem.
      parameters: from :func:`ef_bv_parameters`, or your own with r in [0, 1).

    Returns:
      The step size gamma; 1/L without compression.

    Raises:
      ValueError: if r is not in [0, 1), where the control variates need not converge.

    Example:
      >>> ef_bv_step(Smoothness(L=1.0, L_i=(1.0,)), ef_bv_parameters(eta=0.0, omega=0.0))
      1.0

    References:
      Condat, Yi, Richtarik, "EF-BV", NeurIPS 2022; formula as in WilliamYi96/EF-BV.
    """
    r = _check.fraction("parameters.r", parameters.r)
    r_av = _check.non_negative("parameters.r_av", parameters.r_av)
    # sqrt(r_av/r)/s = sqrt(r_av)/(sqrt((1+r)/2) - sqrt(r)), which does not divide by r = 0.
    return 1 / (constants.L + constants.L_QM * math.sqrt(r_av) / (math.sqrt((1 + r) / 2) - r**0.5))


def diana_step(constants: Smoothness, omega: float, *, rule: str = "max") -> float:
    """The step of DIANA on strongly convex problems, as two public implementations have it.

    Args:
      constants: smoothness constants of the problem.
      omega: variance of the unbiased compressor, independent on every worker.
      rule: ``"max"`` is ``1/(L_max (1 + 4 omega/n))`` (burlachenkok/flpytorch), ``"mean"`` is
        ``1/(L (1 + 6 omega/n))`` (WilliamYi96/EF-BV).

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> c = Smoothness(L=1.0, L_i=(1.0, 2.0))
      >>> diana_step(c, 1.0), diana_step(c, 1.0, rule="mean")
      (0.16666666666666666, 0.25)

    References:
      Mishchenko, Gorbunov, Takac, Richtarik, "Distributed Learning with Compressed Gradient
      Differences", 2019.
    """
    q = _check.non_negative("omega", omega) / constants.num_workers
    if rule == "max":
        return 1 / (constants.L_max * (1 + 4 * q))
    if rule == "mean":
        return 1 / (constants.L * (1 + 6 * q))
    raise ValueError(f'rule={rule!r} must be "max" or "mean".')


def econtrol_strength(alpha: float) -> float:
    r"""The strength of EControl: how much of the accumulated error it adds to a message.

    .. math:: \eta = \frac{\alpha}{3 \sqrt{1 - \alpha}\,(1 + \sqrt{1 - \alpha})}

    It is that of the convergence theorem of EControl with dual averaging.

    Args:
      alpha: contraction of the compressor in (0, 1); 1 loses nothing, so any strength will do.

    Returns:
      eta; about alpha/6 for a strong compressor.

    Raises:
      ValueError: if ``alpha`` is out of range.

    Example:
      >>> econtrol_strength(0.75)  # 3/4 / (3 * 1/2 * 3/2)
      0.3333333333333333

    References:
      Gao, Rodomanov, Rack, Stich, "Composite Optimization with Error Feedback: the Dual Averaging
      Approach", ICLR 2026 (arXiv 2510.03507), by a summary; unverified.
    """
    alpha = _check.contraction("alpha", alpha)
    if alpha == 1:
        raise ValueError("alpha=1 must be below 1: nothing is lost, and any strength will do.")
    q = math.sqrt(1 - alpha)
    return alpha / (3 * q * (1 + q))


def marina_step(
    constants: Smoothness, omega: float, probability: float, participants: int | None = None
) -> float:
    """The step of MARINA: ``1/(L + L_QM sqrt((1 - p) omega/(p n)))``.

    For PP-MARINA with r participants it is ``1/(L + L_QM sqrt((1 - p)(1 + omega)/(p r)))``, in
    which the draw of the participants is part of the variance. (The formula is derived here, for
    draws with or without replacement; the public code burlachenkok/flpytorch has the largest L_i in
    place of both constants.)

    Args:
      constants: smoothness constants of the problem.
      omega: variance of the unbiased compressor, independent on every worker.
      probability: p in (0, 1], how often the exact gradient is sent; k/d for rand-k, times r/n
        with participants.
      participants: r of PP-MARINA, in 1..n; None if all workers take part.

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> marina_step(Smoothness(L=1.0, L_i=(1.0,) * 4), omega=4.0, probability=0.5)
      0.5
      >>> marina_step(Smoothness(L=1.0, L_i=(1.0,) * 4), 3.0, 0.5, participants=1)
      0.3333333333333333

    References:
      Gorbunov, Burlachenko, Li, Richtarik, "MARINA", ICML 2021; form of mysteryresearcher/dasha.
    """
    omega = _check.non_negative("omega", omega)
    p, n = _check.contraction("probability", probability), constants.num_workers
    if participants is None:
        variance = omega / n
    else:
        r = _check.count("participants", participants)
        if r > n:
            raise ValueError(f"participants={r} must be at most the number of workers, {n}.")
        variance = (1 + omega) / r
    return 1 / (constants.L + constants.L_QM * math.sqrt((1 - p) * variance / p))


class ThreePoint(NamedTuple):
    """``E||C_{h,y}(x) - x||^2 <= (1 - A) ||h - y||^2 + B ||x - y||^2``."""

    A: float
    B: float


def three_point_constants(
    variant: str,
    *,
    alpha: float = 1.0,
    zeta: float = 0.0,
    omega: float = 0.0,
    second_alpha: float = 1.0,
    inner: ThreePoint | None = None,
    probability: float = 1.0,
) -> ThreePoint:
    """The constants A and B of a three-point compressor.

    ======== ======================================================= ==============================
    variant  C_{h,y}(x)                                              uses
    ======== ======================================================= ==============================
    "ef21"   ``h + C(x - h)``                                        alpha
    "lag"    x if ``||x-h||^2 > zeta ||x-y||^2``, else h             zeta
    "clag"   ``h + C(x - h)`` under the same condition, else h       alpha, zeta
    "v1"     ``y + C(x - y)``                                        alpha
    "v2"     ``b = h + Q(x - y)``; ``b + C(x - b)``                  alpha, omega of Q
    "v3"     ``b`` of another 3PC compressor; ``b + C(x - b)``       alpha, inner
    "v4"     ``b = h + C2(x - h)``; ``b + C(x - b)``                 alpha, second_alpha of C2
    "v5"     x with probability p, else ``h + C(x - y)``             alpha, probability
    ======== ======================================================= ==============================

    Args:
      variant: the row of the table.
      alpha: contraction of C in (0, 1].
      zeta: trigger of LAG and CLAG, at least 0.
      omega: variance of the unbiased Q of v2.
      second_alpha: contraction of C2 of v4.
      inner: the constants of v3's inner compressor.
      probability: p of v5 in (0, 1].

    Returns:
      A and B.

    Raises:
      ValueError: if the variant is unknown or an argument is out of range.

    Example:
      >>> three_point_constants("ef21", alpha=0.75)
      ThreePoint(A=0.5, B=0.5)

    References:
      Richtarik, Sokolov, Fatkhullin, Gasanov, Li, Gorbunov, "3PC", ICML 2022.
    """
    a = _check.contraction("alpha", alpha)
    zeta = _check.non_negative("zeta", zeta)
    p = _check.contraction("probability", probability)
    match variant:
        case "ef21":
            return ThreePoint(theta(a), beta(a))
        case "lag":
            return ThreePoint(1.0, zeta)
        case "clag":
            return ThreePoint(theta(a), max(beta(a), zeta))
        case "v1":
            return ThreePoint(1.0, 1 - a)
        case "v2":
            return ThreePoint(a, (1 - a) * _check.non_negative("omega", omega))
        case "v3":
            if inner is None:
                raise ValueError('inner=None: variant "v3" needs the constants of its inner 3PC.')
            return ThreePoint(1 - (1 - a) * (1 - inner.A), (1 - a) * inner.B)
        case "v4":
            both = 1 - (1 - a) * (1 - _check.contraction("second_alpha", second_alpha))
            return ThreePoint(theta(both), beta(both))
        case "v5":
            return ThreePoint(theta(p), beta(p) * (1 - a))
        case _:
            raise ValueError(
                f"variant={variant!r} must be one of ef21, lag, clag, v1, v2, v3, v4, v5."
            )


def three_point_step(constants: Smoothness, three_point: ThreePoint) -> float:
    """The step of a method with a 3PC compressor: ``1/(L + L_QM sqrt(B/A))``.

    Args:
      constants: smoothness constants of the problem.
      three_point: from :func:`three_point_constants`.

    Returns:
      The step size gamma.

    Raises:
      ValueError: if A is not in (0, 1] or B is negative.

    Example:
      >>> c = Smoothness(L=1.0, L_i=(1.0,))
      >>> three_point_step(c, three_point_constants("ef21", alpha=0.75))
      0.5

    References:
      Richtarik, Sokolov, Fatkhullin, Gasanov, Li, Gorbunov, "3PC", ICML 2022.
    """
    A = _check.contraction("three_point.A", three_point.A)
    B = _check.non_negative("three_point.B", three_point.B)
    return 1 / (constants.L + constants.L_QM * math.sqrt(B / A))
