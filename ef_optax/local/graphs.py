"""Graphs of workers as mixing weights: doubly stochastic matrices.

Row i has the weights with which worker i takes the models of the others; every worker keeps some of
its own. The smaller the spectral gap, the slower the workers agree: 1 - O(1/n^2) for a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ef_optax.extend import check


def ring(num_workers: int) -> np.ndarray:
    """A ring: every worker hears its two neighbours, and takes 1/3 of each and of itself.

    Args:
      num_workers: n.

    Returns:
      The weights, (n, n) float64; of two workers 1/2 each.

    Example:
      >>> ring(4).round(2).tolist()[0]
      [0.33, 0.33, 0.0, 0.33]
    """
    check.count("ring", "num_workers", num_workers)
    eye = np.eye(num_workers)
    joined = (eye + np.roll(eye, 1, axis=1) + np.roll(eye, -1, axis=1)) > 0
    return joined / joined.sum(1, keepdims=True)


def complete(num_workers: int) -> np.ndarray:
    """All workers hear all others, with the weight 1/n.

    Args:
      num_workers: n.

    Returns:
      The weights, (n, n) float64.

    Example:
      >>> complete(2).tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """
    check.count("complete", "num_workers", num_workers)
    return np.full((num_workers, num_workers), 1 / num_workers)


def metropolis(edges: Iterable[tuple[int, int]]) -> Callable[[int], np.ndarray]:
    r"""The Metropolis-Hastings weights of any undirected graph.

    .. math:: w_{ij} = \frac{1}{1 + \max(d_i, d_j)} \text{ for an edge}, \quad
              w_{ii} = 1 - \sum_{j \ne i} w_{ij}

    Args:
      edges: pairs of different workers, in any order; each counts in both directions.

    Returns:
      A function from the number of workers to the weights, (n, n) float64.

    Raises:
      ValueError: when called, for an edge that does not join two of the n workers.

    Example:
      A line of three workers:

      >>> metropolis([(0, 1), (1, 2)])(3).round(2).tolist()
      [[0.67, 0.33, 0.0], [0.33, 0.33, 0.33], [0.0, 0.33, 0.67]]

    References:
      Xiao, Boyd, "Fast linear iterations for distributed averaging", 2004.
    """
    pairs = sorted({(min(edge), max(edge)) for edge in edges})

    def weights(num_workers: int) -> np.ndarray:
        check.count("metropolis", "num_workers", num_workers)
        joined = np.zeros((num_workers, num_workers), bool)
        for i, j in pairs:
            if not 0 <= i < j < num_workers:
                raise ValueError(
                    f"metropolis: edges has {(i, j)}, which does not join two of the workers 0 to "
                    f"{num_workers - 1}."
                )
            joined[i, j] = joined[j, i] = True
        degree = joined.sum(1)
        W = joined / (1.0 + np.maximum(degree[:, None], degree))
        return W + np.diag(1 - W.sum(1))

    return weights
