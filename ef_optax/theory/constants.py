"""The smoothness constants of f(x) = mean_i f_i(x), exact if there is a closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ef_optax.theory import _check


@dataclasses.dataclass(frozen=True)
class Smoothness:
    """Smoothness constants of a problem with n workers, ``f(x) = mean_i f_i(x)``.

    Attributes:
      L: f is L-smooth, ``||grad f(x) - grad f(y)|| <= L ||x - y||``.
      L_i: the constant of each worker's f_i, n positive numbers. A worker with constant zero has
        a constant gradient: leave it out or give it a small constant.
      L_plus: any number with ``mean_i ||grad f_i(x) - grad f_i(y)||^2 <= L_plus^2 ||x - y||^2``,
        or None; it never needs to be larger than ``L_QM``.

    Example:
      >>> c = Smoothness(L=30.0, L_i=(1.0, 1.0, 1.0, 100.0))
      >>> c.L_QM, c.L_AM, c.L_var
      (50.00749943758436, 25.75, 1837.6875)

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Example 2.1.
    """

    L: float
    L_i: tuple[float, ...]
    L_plus: float | None = None

    def __post_init__(self) -> None:
        _check.positive("L", self.L)
        if len(self.L_i) == 0:
            raise ValueError("L_i=() has no worker; give one constant per worker.")
        object.__setattr__(
            self, "L_i", tuple(_check.positive(f"L_i[{i}]", v) for i, v in enumerate(self.L_i))
        )
        if self.L_plus is not None:
            _check.positive("L_plus", self.L_plus)

    @property
    def num_workers(self) -> int:
        """The number of workers n."""
        return len(self.L_i)

    @property
    def L_AM(self) -> float:
        """The arithmetic mean of the L_i."""
        return math.fsum(self.L_i) / self.num_workers

    @property
    def L_QM(self) -> float:
        """The quadratic mean ``sqrt(mean_i L_i^2)``, never below ``L_AM``."""
        return math.sqrt(math.fsum(v * v for v in self.L_i) / self.num_workers)

    @property
    def L_var(self) -> float:
        """The variance ``mean_i (L_i - L_AM)^2 = L_QM^2 - L_AM^2``."""
        mean = self.L_AM
        return math.fsum((v - mean) ** 2 for v in self.L_i) / self.num_workers

    @property
    def L_max(self) -> float:
        """The largest L_i."""
        return max(self.L_i)


def least_squares(
    features: Sequence[Any], *, scale: float = 1.0, l2: float = 0.0, nonconvex: float = 0.0
) -> Smoothness:
    """Exact constants of least squares, ``f_i = scale/(2 m_i) ||A_i x - b_i||^2 + regulariser``.

    The Hessians are ``H_i = scale A_i^T A_i / m_i + (l2 + 2 nonconvex) I``: the regulariser
    ``nonconvex sum_j x_j^2/(1 + x_j^2)`` has curvature between ``-nonconvex/2`` and
    ``2 nonconvex``, the latter at x = 0. Without it the Hessians are constant, and
    ``L_plus = lambda_max(mean_i H_i^2)^(1/2)`` is exact too.

    Args:
      features: one matrix A_i of shape (m_i, d) per worker; m_i may differ.
      scale: multiplies the data term; ``scale=2`` is ``(1/m_i)||A_i x - b_i||^2``.
      l2: weight of ``(l2/2)||x||^2``.
      nonconvex: weight of ``sum_j x_j^2/(1 + x_j^2)``.

    Returns:
      The :class:`Smoothness` of the problem. For f pooled over all rows give one matrix.

    Raises:
      ValueError: if the matrices do not have the same number of columns, or a weight is negative.

    Example:
      >>> least_squares([np.eye(2), 2 * np.eye(2)])
      Smoothness(L=1.25, L_i=(0.5, 2.0), L_plus=1.4577379737113252)

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021, experiments.
    """
    _check.positive("scale", scale)
    return _from_hessians(features, scale, l2, nonconvex, constant=nonconvex == 0)


def logistic_regression(
    features: Sequence[Any], *, l2: float = 0.0, nonconvex: float = 0.0
) -> Smoothness:
    """Exact constants of logistic regression with labels -1, +1 and an optional regulariser.

    ``f_i = mean_j log(1 + exp(-b_j <a_j, x>)) + (l2/2)||x||^2 + nonconvex sum x^2/(1 + x^2)`` has
    its largest curvature at x = 0: ``H_i = A_i^T A_i/(4 m_i) + (l2 + 2 nonconvex) I``. The labels
    do not matter.

    Args:
      features: one matrix A_i of shape (m_i, d) per worker; m_i may differ.
      l2: weight of ``(l2/2)||x||^2``.
      nonconvex: weight of ``sum_j x_j^2/(1 + x_j^2)``.

    Returns:
      The :class:`Smoothness` of the problem. For f pooled over all rows give one matrix.

    Raises:
      ValueError: if the matrices do not have the same number of columns, or a weight is negative.

    Example:
      >>> logistic_regression([np.eye(2), 2 * np.eye(2)], nonconvex=0.1)
      Smoothness(L=0.5125, L_i=(0.325, 0.7), L_plus=None)

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", 2021, experiments.
    """
    return _from_hessians(features, 0.25, l2, nonconvex, constant=False)


def _from_hessians(
    features: Sequence[Any], scale: float, l2: float, nonconvex: float, *, constant: bool
) -> Smoothness:
    shift = _check.non_negative("l2", l2) + 2 * _check.non_negative("nonconvex", nonconvex)
    parts = [np.asarray(A, np.float64) for A in features]
    if not parts:
        raise ValueError("features=[] has no worker; give one matrix (m_i, d) per worker.")
    for i, A in enumerate(parts):
        if A.ndim != 2 or A.shape[1:] != parts[0].shape[1:] or 0 in A.shape:
            raise ValueError(
                f"features[{i}] has shape {A.shape}; every worker needs a matrix (m_i, d) with "
                f"m_i >= 1 and the d of features[0], whose shape is {parts[0].shape}."
            )
    d, n = parts[0].shape[1], len(parts)
    mean, square = np.zeros((d, d)), np.zeros((d, d))
    L_i = []
    for A in parts:
        m = len(A)
        # The smaller of the two Gram matrices has the same largest eigenvalue.
        small = A @ A.T if m < d else A.T @ A
        L_i.append(float(scale * np.linalg.eigvalsh(small)[-1] / m + shift))
        H = (scale / m) * (A.T @ A)
        mean += H / n
        if constant:
            square += (H @ H + 2 * shift * H) / n
    L = float(np.linalg.eigvalsh(mean)[-1] + shift)
    L_plus = math.sqrt(float(np.linalg.eigvalsh(square)[-1]) + shift**2) if constant else None
    return Smoothness(L, tuple(L_i), L_plus)
