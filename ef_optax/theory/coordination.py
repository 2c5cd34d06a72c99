"""What else must change when compression begins: the step, and the batch."""

from __future__ import annotations

import math

from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness
from ef_optax.theory.contraction import xi


def rate_factor(alpha: float, constants: Smoothness | None = None) -> float:
    """By what EF21's largest step shrinks when compression begins: ``L/(L + L_QM xi(alpha))``.

    For workers of equal smoothness it is ``1/(1 + xi(alpha))``: a reduction by 2 to 5 belongs to
    alpha = 0.75 to 0.36. It is for a rate that was at the largest dense step. The leading term of
    EF14 asks for no reduction, so there a smaller rate is a choice and not a requirement.

    Args:
      alpha: contraction of the compressor in (0, 1]; the smallest, if the compressor changes.
      constants: smoothness constants of the problem; None for equal ones.

    Returns:
      The factor in (0, 1].

    Raises:
      ValueError: if ``alpha`` is out of range.

    Example:
      >>> rate_factor(0.75), rate_factor(1.0)
      (0.5, 1.0)

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021 (the step).
    """
    if constants is None:
        return 1 / (1 + xi(alpha))
    return constants.L / (constants.L + constants.L_QM * xi(alpha))


def ef21_batch(alpha: float, sigma: float, tolerance: float) -> int:
    """The batch that plain EF21 needs for a stochastic gradient norm of ``tolerance``.

    EF21 without momentum tracks the noise of its gradients: with noise sigma of a single sample,
    a batch of ``ceil(sigma^2/(alpha^2 tolerance^2))`` samples is sufficient (order of magnitude,
    unverified constant). This is theory for EF21-SGD only. EF21-SGDM (:func:`ef21_momentum`) needs
    no larger batch at all, and for EF14 nothing asks for one. The advice to take a batch 2 to 4
    times larger when compression begins is folklore.

    Args:
      alpha: contraction of the compressor in (0, 1].
      sigma: standard deviation of a single sample's gradient, at least 0.
      tolerance: the gradient norm to be reached, positive.

    Returns:
      Samples in one worker's batch, at least 1.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> ef21_batch(0.5, sigma=1.0, tolerance=0.5)
      16

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021 (the batch);
      Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", 2023 (without).
    """
    a = _check.contraction("alpha", alpha)
    noise, bound = _check.non_negative("sigma", sigma), _check.positive("tolerance", tolerance)
    return max(1, math.ceil((noise / (a * bound)) ** 2))
