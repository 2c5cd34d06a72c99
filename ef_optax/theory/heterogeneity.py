"""Workers that differ: EF21-W's weights, the cloning construction, rare features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ef_optax.theory import _check
from ef_optax.theory.constants import Smoothness
from ef_optax.theory.contraction import xi


def weights(constants: Smoothness) -> tuple[float, ...]:
    """EF21-W's weights ``w_i = L_i/sum_j L_j``, which sum to 1.

    Args:
      constants: smoothness constants of the problem.

    Returns:
      n weights.

    Example:
      >>> weights(Smoothness(L=2.0, L_i=(1.0, 3.0)))
      (0.25, 0.75)

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Theorem 2.
    """
    total = math.fsum(constants.L_i)
    return tuple(v / total for v in constants.L_i)


def ef21_w_step(constants: Smoothness, alpha: float) -> float:
    """The step of EF21-W with weights :func:`weights`: ``1/(L + L_AM xi(alpha))``.

    It covers exact gradients and full participation only. For the stochastic form and for partial
    participation no constant could be compared with the publication, so none is given.

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the compressor in (0, 1].

    Returns:
      The step size gamma.

    Raises:
      ValueError: if ``alpha`` is out of range.

    Example:
      >>> ef21_w_step(Smoothness(L=2.0, L_i=(1.0, 3.0)), 0.75)
      0.25

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Theorem 2.
    """
    return 1 / (constants.L + constants.L_AM * xi(alpha))


@dataclasses.dataclass(frozen=True)
class Cloning:
    """A problem in which demanding workers are split into several clones.

    Attributes:
      counts: how many clones each worker gets, ``N_i = ceil(L_i/L_AM)``.
      scales: each clone of worker i has the objective ``scales[i] f_i``, ``N/(n N_i)``, so that
        the mean over all N clones is still f.
      constants: smoothness constants of the cloned problem, worker by worker.
    """

    counts: tuple[int, ...]
    scales: tuple[float, ...]
    constants: Smoothness

    @property
    def total(self) -> int:
        """The number of clones N, at most 2n."""
        return sum(self.counts)

    @property
    def owners(self) -> tuple[int, ...]:
        """The original worker of each clone, N indices."""
        return tuple(i for i, c in enumerate(self.counts) for _ in range(c))

    def gradients(self, gradients: Any) -> Any:
        """Every clone's gradient from every worker's: a tree of (n, ...) becomes one of (N, ...).

        Clones of a worker have the same objective, so its gradient is computed once and repeated,
        times its factor. ``ef_optax.simulate(tx, cloning.total, axis)`` takes the result.

        Example:
          >>> clones = cloning(Smoothness(L=2.0, L_i=(1.0, 3.0)))  # counts 1 and 2
          >>> clones.gradients(np.array([[2.0], [2.0]])).round(3).tolist()
          [[3.0], [1.5], [1.5]]
        """
        owners = np.asarray(self.owners, np.int32)
        factors = np.asarray([self.scales[i] for i in owners])

        def one(g: Any) -> Any:
            factor = factors.astype(g.dtype).reshape(-1, *[1] * (g.ndim - 1))
            return g[owners] * factor

        return jax.tree.map(one, gradients)


def cloning(constants: Smoothness) -> Cloning:
    """Clones workers until their constants are nearly equal: ``N_i = ceil(L_i/L_AM)``.

    The quadratic mean of the cloned constants is at most ``sqrt(2) L_AM``, with at most 2n clones.
    To run EF21 on the clones, give it ``cloned.gradients(...)`` of ``cloned.total`` workers.

    Args:
      constants: smoothness constants of the problem.

    Returns:
      The counts, the factors of the objectives and the cloned constants.

    Example:
      >>> cloned = cloning(Smoothness(L=30.0, L_i=(1.0, 1.0, 1.0, 100.0)))
      >>> cloned.counts, cloned.total, round(cloned.constants.L_QM, 9)
      ((1, 1, 1, 4), 7, 33.091728574)

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Theorem 1, Example 2.1.
    """
    n, average = constants.num_workers, constants.L_AM
    # The margin keeps rounding of the mean from giving equal workers two clones each.
    counts = tuple(max(1, math.ceil(v / average * (1 - 1e-12))) for v in constants.L_i)
    N = sum(counts)
    scales = tuple(N / (n * c) for c in counts)
    cloned = tuple(
        scale * v
        for scale, v, c in zip(scales, constants.L_i, counts, strict=True)
        for _ in range(c)
    )
    return Cloning(counts, scales, Smoothness(constants.L, cloned))


def cloning_step(constants: Smoothness, alpha: float) -> float:
    """EF21's step on the cloned problem, by the bound: ``1/(L + sqrt(2) L_AM xi(alpha))``.

    The step from the exact cloned constants, ``ef21_step(cloning(c).constants, alpha, mean="QM")``,
    is never smaller.

    Args:
      constants: smoothness constants of the *original* problem.
      alpha: contraction of the compressor in (0, 1].

    Returns:
      The step size gamma.

    Raises:
      ValueError: if ``alpha`` is out of range.

    Example:
      >>> round(cloning_step(Smoothness(L=1.0, L_i=(1.0, 1.0)), 0.75), 6)
      0.414214

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Reloaded", ICLR 2024, Theorem 1.
    """
    return 1 / (constants.L + math.sqrt(2) * constants.L_AM * xi(alpha))


def rare_feature_count(features: Sequence[Any]) -> int:
    """The largest number of workers that share one feature, ``c``; between 1 and n.

    Args:
      features: one matrix (m_i, d) per worker; a worker has feature j if column j is not zero.

    Returns:
      c.

    Raises:
      ValueError: if no worker has any feature.

    Example:
      >>> rare_feature_count([np.diag([1.0, 1.0, 0.0]), np.diag([0.0, 1.0, 1.0])])
      2

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Shines when Features are Rare", 2023.
    """
    present = [np.any(np.asarray(A) != 0, axis=0) for A in features]
    c = int(np.max(np.sum(present, axis=0), initial=0)) if present else 0
    if c == 0:
        raise ValueError("features: no worker has a feature that is not zero; check the data.")
    return c


def rare_features_step(constants: Smoothness, alpha: float, shared_by: int) -> float:
    """EF21's step when no feature is on more than c workers: ``1/(L + L_+ sqrt(c/n) xi(alpha))``.

    It needs a sparsifier, and a start ``g_i^0`` that is zero on features the worker does not have.
    ``L_+`` is the smallest of ``constants.L_plus`` if it is given, ``L_QM`` and
    ``sqrt(c/n) max_i L_i``. (A later publication has L_AM in its place, which is unverified and
    does not always give a larger step.)

    Args:
      constants: smoothness constants of the problem.
      alpha: contraction of the sparsifier in (0, 1].
      shared_by: c, see :func:`rare_feature_count`.

    Returns:
      The step size gamma, never smaller than EF21's QM step.

    Raises:
      ValueError: if ``alpha`` is out of range, or ``shared_by`` not in 1..n.

    Example:
      >>> c = Smoothness(L=1.0, L_i=(1.0,) * 100)
      >>> f"{rare_features_step(c, 0.75, 100):.3f} {rare_features_step(c, 0.75, 1):.3f}"
      '0.500 0.990'

    References:
      Richtarik, Gasanov, Burlachenko, "Error Feedback Shines when Features are Rare", 2023; L_+ as
      in the public code burlachenkok/ef21_with_rare_features.
    """
    n, c = constants.num_workers, _check.count("shared_by", shared_by)
    if c > n:
        raise ValueError(f"shared_by={shared_by!r} must be at most the number of workers, {n}.")
    share = math.sqrt(c / n)
    known = [constants.L_QM, share * constants.L_max]
    if constants.L_plus is not None:
        known.append(constants.L_plus)
    return 1 / (constants.L + min(known) * share * xi(alpha))
