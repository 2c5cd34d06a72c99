"""Step sizes and the rate of EF21 and its extensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness
from ef_optax.theory.contraction import theta, xi


def ef21_step(constants: Smoothness, alpha: float, *, mean: Literal["AM", "QM"] = "AM") -> float:
    """The largest step that EF21's theory allows: ``1/(L + L_mean xi(alpha))``.

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1]; the smallest, if the compressor changes.
      mean: ``"QM"`` is the original theorem; ``"AM"`` is the sharper one, whose step is never
        smaller (taken from summaries of the publication).

    Returns:
      The step size gamma.

    Raises:
      ValueError: if ``alpha`` or ``mean`` is out of range.

    Example:
      >>> c = Smoothness(L=2.0, L_i=(1.0, 3.0))
      >>> ef21_step(c, 0.75), ef21_step(c, 1.0)
      (0.25, 0.5)

    References:
      QM: Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
      AM: Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Theorem 3.
    """
    if mean not in ("AM", "QM"):
        raise ValueError(f'mean={mean!r} must be "AM" or "QM".')
    average = constants.L_AM if mean == "AM" else constants.L_QM
    return 1 / (constants.L + average * xi(alpha))


def ef21_pl_step(constants: Smoothness, alpha: float, mu: float) -> float:
    """EF21's step under the Polyak-Lojasiewicz condition.

    ``gamma = min{1/(L + sqrt(2) L_QM xi(alpha)), theta(alpha)/(2 mu)}``; every round multiplies
    ``f - f*`` by ``1 - gamma mu``.

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1].
      mu: the constant in ``||grad f(x)||^2 >= 2 mu (f(x) - f*)``.

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef21_pl_step(Smoothness(L=1.0, L_i=(1.0,)), 1.0, mu=0.1)
      1.0

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    _check.positive("mu", mu)
    smooth = 1 / (constants.L + math.sqrt(2) * constants.L_QM * xi(alpha))
    return min(smooth, theta(alpha) / (2 * mu))


def ef21_bound(
    learning_rate: float, alpha: float, initial_gap: float, initial_distortion: float, steps: int
) -> float:
    """Bounds ``mean_{t<T} E||grad f(x^t)||^2 <= 2 (f(x^0) - f*)/(gamma T) + G^0/(theta T)``.

    Holds for ``learning_rate`` at most :func:`ef21_step`. For EF21-W take
    ``G^0 = sum_i w_i ||grad f_i(x^0)/(n w_i) - g_i^0||^2``.

    Args:
      learning_rate: gamma.
      alpha: contraction of the compressor in (0, 1].
      initial_gap: ``f(x^0) - f*``.
      initial_distortion: ``G^0 = mean_i ||g_i^0 - grad f_i(x^0)||^2``, 0 with the full start.
      steps: T.

    Returns:
      The bound on the mean expected squared gradient norm over the first T iterates.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef21_bound(0.5, 0.75, initial_gap=1.0, initial_distortion=0.5, steps=10)
      0.5

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021.
    """
    gamma = _check.positive("learning_rate", learning_rate)
    gap = _check.non_negative("initial_gap", initial_gap)
    G0 = _check.non_negative("initial_distortion", initial_distortion)
    T = _check.count("steps", steps)
    return 2 * gap / (gamma * T) + G0 / (theta(alpha) * T)


def ef21_heavy_ball_step(constants: Smoothness, alpha: float, decay: float) -> float:
    """A cautious step for EF21-HB: ``(1 - decay)`` times EF21's QM step (unverified constant).

    With ``v <- decay v + g`` a constant gradient g moves the iterate by ``gamma/(1 - decay) g`` in
    a round; this step keeps the factor at EF21's step. The published runs use EF21's own step times
    powers of two.

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1].
      decay: the momentum decay (eta in the paper) in [0, 1).

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef21_heavy_ball_step(Smoothness(L=1.0, L_i=(1.0,)), 0.75, decay=0.5)
      0.25

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021 (method).
    """
    return (1 - _check.fraction("decay", decay)) * ef21_step(constants, alpha, mean="QM")


def ef21_partial_participation_step(
    constants: Smoothness,
    alpha: float,
    probability: float,
    *,
    rho: float | None = None,
    s: float | None = None,
) -> float:
    """The step of EF21-PP if every worker takes part with the same probability p.

    With ``theta = 1 - (1+s)(1-alpha)``, ``beta = (1+1/s)(1-alpha)`` and
    ``theta_p = rho p + theta p - rho`` it is ``1/(L + sqrt(B/theta_p))`` where
    ``B = (beta p + (1 + 1/rho)(1-p)) L_QM^2``. Unless they are given, rho and s are chosen to make
    the step largest (the public code fixes both at 0.001). At p = 1 it is EF21's QM step.

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1].
      probability: p in (0, 1], the same for all, independent draws.
      rho: positive parameter of the analysis, or None.
      s: positive parameter of the analysis, or None.

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range, or the given rho and s make theta or theta_p
        non-positive, which the theory does not cover.

    Example:
      >>> c = Smoothness(L=1.0, L_i=(1.0,))
      >>> fixed = ef21_partial_participation_step(c, 0.01, 0.5, rho=1e-3, s=1e-3)
      >>> best = ef21_partial_participation_step(c, 0.01, 0.5)
      >>> f"{fixed:.6f} {best:.6f}"
      '0.002001 0.002503'

    References:
      Fatkhullin et al., "EF21 with Bells & Whistles", 2021, Theorem 7, in the form of the public
      code burlachenkok/flpytorch.
    """
    a = _check.contraction("alpha", alpha)
    p = _check.contraction("probability", probability)
    if (rho is None) != (s is None):
        raise ValueError(f"rho={rho!r} and s={s!r}: give both, or neither to have them optimised.")

    def squared(rho: float, s: float) -> float:
        """B/(theta_p L_QM^2); infinite if the theory does not cover rho and s."""
        th = 1 - (1 + s) * (1 - a)
        th_p = th * p - rho * (1 - p)
        if th <= 0 or th_p <= 0:
            return math.inf
        return ((1 + 1 / s) * (1 - a) * p + (1 + 1 / rho) * (1 - p)) / th_p

    if rho is not None and s is not None:
        _check.positive("rho", rho)
        _check.positive("s", s)
        value = squared(rho, s)
        if value == math.inf:
            raise ValueError(
                f"rho={rho!r}, s={s!r} make theta or theta_p non-positive at alpha={alpha!r}, "
                f"probability={probability!r}; take smaller ones or leave them out."
            )
    elif p == 1:
        value = xi(a) ** 2
    else:
        value = _smallest(squared, a, p)
    return 1 / (constants.L + constants.L_QM * math.sqrt(value))


def _smallest(squared: Callable[[float, float], float], a: float, p: float) -> float:
    """The minimum of ``squared``, unimodal in rho and in s, by nested golden-section searches."""
    s_max = a / (1 - a) if a < 1 else 1.0

    def over_rho(s: float) -> float:
        th = 1 - (1 + s) * (1 - a)
        return _golden(lambda rho: squared(rho, s), th * p / (1 - p))

    # Without compression s does not matter: its terms vanish.
    return over_rho(1.0) if a == 1 else _golden(over_rho, s_max)


def _golden(f: Callable[[float], float], upper: float, iterations: int = 80) -> float:
    """The minimum of a unimodal f on (0, upper)."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, upper
    for _ in range(iterations):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if f(left) < f(right) else (left, high)
    return f((low + high) / 2)


def ef21_momentum_step(constants: Smoothness, alpha: float, fresh_weight: float) -> float:
    """The step of EF21-SGDM: ``min{alpha/(20 L_QM), eta/(7 L)}`` (unverified constant).

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1].
      fresh_weight: eta in (0, 1], the weight of the fresh gradient (1 is EF21-SGD).

    Returns:
      The step size gamma.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef21_momentum_step(Smoothness(L=1.0, L_i=(1.0,)), alpha=1.0, fresh_weight=0.07)
      0.01

    References:
      Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023.
    """
    a = _check.contraction("alpha", alpha)
    eta = _check.contraction("fresh_weight", fresh_weight)
    return min(a / (20 * constants.L_QM), eta / (7 * constants.L))


def ef21_momentum_weight(
    constants: Smoothness, alpha: float, variance: float, initial_gap: float, steps: int
) -> float:
    """EF21-SGDM's fresh-gradient weight for a horizon of T steps (unverified constant).

    ``min{1, (L d0 alpha^2/(s2 T))^(1/4), (L d0 alpha/(s2 T))^(1/3), (L d0 n/(s2 T))^(1/2)}``.

    Args:
      constants: smoothness constants of the problem; n is the number of its L_i.
      alpha: contraction of the compressor in (0, 1].
      variance: s2, the variance of one worker's stochastic gradient; 0 gives 1.
      initial_gap: ``d0 = f(x^0) - f*``.
      steps: T.

    Returns:
      The weight eta in (0, 1].

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> c = Smoothness(L=1.0, L_i=(1.0,) * 4)
      >>> ef21_momentum_weight(c, 1.0, variance=1.0, initial_gap=1.0, steps=10_000)
      0.02

    References:
      Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023.
    """
    a = _check.contraction("alpha", alpha)
    s2 = _check.non_negative("variance", variance)
    d0 = _check.positive("initial_gap", initial_gap)
    T = _check.count("steps", steps)
    if s2 == 0:
        return 1.0
    q = constants.L * d0 / (s2 * T)
    return min(
        1.0, (q * a**2) ** (1 / 4), (q * a) ** (1 / 3), (q * constants.num_workers) ** (1 / 2)
    )
