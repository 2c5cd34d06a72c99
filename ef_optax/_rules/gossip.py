"""Exchanges between neighbours, for rules in which every worker has a model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ef_optax._core.need import Need
from ef_optax._exchange import collectives
from ef_optax._exchange.collectives import AxisName
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._exchange.neighbours import Graph
from ef_optax._numeric.dtypes import Array
from ef_optax._rules.needs import exchange_for
from ef_optax.compressors.combine.identity import Identity
from ef_optax.compressors.compressor import Compressor

GraphLike = Callable[[int], ArrayLike] | Sequence[Sequence[float]] | np.ndarray
"""Mixing weights: a doubly stochastic matrix, or a function that makes it for n workers."""

ALONE = Need(
    lambda codec: codec.self_contained and codec.independent,
    "makes its message together with all workers, but only neighbours hear each other here",
    "choose a compressor such as top_k or scaled_sign, without a transport around it",
)


def exchange_with_neighbours(
    rule: str,
    compressor: Compressor,
    graph: GraphLike,
    axis_name: AxisName = None,
    *,
    needs: Sequence[Need] = (),
) -> Exchange:
    """The exchange of a rule whose workers hear only their neighbours.

    Its aggregate is ``sum_j w_ij C(x_j)``, which differs between the workers, and no flag travels
    that makes all of them skip a step together: the rule must leave out bad gradients itself
    (:func:`own_models.inner_step`).

    Args:
      rule: the rule's name.
      compressor: the user's argument.
      graph: the user's argument.
      axis_name: the worker axis, or None.
      needs: what the rule relies on, besides a message that one worker makes.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: if its codec lacks what the rule
        needs, and for a matrix that is not doubly stochastic, or does not join all workers; if
        ``graph`` is a function, at the first exchange.
    """
    exchange = exchange_for(rule, compressor, axis_name, needs=(ALONE, *needs))
    if callable(graph):
        return dataclasses.replace(exchange, graph=lambda n: _checked(rule, graph(n), n))
    fixed = _checked(rule, graph, None)
    return dataclasses.replace(exchange, graph=lambda n: _of_size(rule, fixed, n))


def _of_size(rule: str, graph: Graph, n: int) -> Graph:
    if len(graph.weights) != n:
        raise ValueError(
            f"{rule}: graph has {len(graph.weights)} rows, but there are {n} workers; give one row "
            "for each, or a function of the number of workers such as ef_optax.local.ring."
        )
    return graph


def _checked(rule: str, weights: ArrayLike, n: int | None) -> Graph:
    """The graph of a matrix, which must be doubly stochastic and connected."""
    matrix = np.asarray(weights, np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    sums = [*matrix.sum(0), *matrix.sum(1)] if square else [0.0]
    if not (square and np.all(matrix >= 0) and np.allclose(sums, 1, atol=1e-6)):
        raise ValueError(
            f"{rule}: graph is a matrix of shape {matrix.shape}, which must be square, without "
            "negative weights, and each of its rows and columns must sum to 1; "
            "ef_optax.local.metropolis makes such weights from the edges of a graph."
        )
    reached = (matrix + matrix.T + np.eye(len(matrix))) > 0
    for _ in range(len(matrix).bit_length()):  # twice as far each time
        reached = reached @ reached
    if not reached.all():
        raise ValueError(
            f"{rule}: graph has parts that never hear of each other; join them with an edge."
        )
    graph = Graph(tuple(map(tuple, matrix.tolist())))
    return graph if n is None else _of_size(rule, graph, n)


def pairings(num_workers: int) -> tuple[Graph, ...]:
    """Ways to form pairs, in which every two workers meet once: a tournament, round by round.

    With an odd number of workers one of them has no partner in each.

    >>> [graph.matchings for graph in pairings(2)]
    [(((0, 1), (1, 0)),)]
    """
    n, found = num_workers, []
    rounds = n - 1 if n % 2 == 0 else n
    for r in range(max(rounds, 1)):
        weights = np.eye(n)
        last = [(r, rounds)] if rounds < n else []
        for i, j in [*last, *(((r + k) % rounds, (r - k) % rounds) for k in range(1, n // 2 + 1))]:
            if i != j and weights[i, i] == weights[j, j] == 1:
                weights[[i, i, j, j], [i, j, i, j]] = 0.5
        found.append(Graph(tuple(map(tuple, weights.tolist()))))
    return tuple(found)


def begin_pairs(tree: Any, axis_name: AxisName) -> ExchangeState:
    """The state of :func:`mean_of_pairs` before the first pairs of trees like this."""
    return Exchange(Identity(), axis_name).init(tree)


def mean_of_pairs(
    tree: Any, state: ExchangeState, number: Array, axis_name: AxisName
) -> tuple[Any, ExchangeState]:
    """Every worker's mean with its partner in pairing ``number``; only these two send anything.

    Args:
      tree: this worker's arrays.
      state: of an exchange of such trees, which counts them.
      number: of the pairing in :func:`pairings`; the same on all workers.
      axis_name: the worker axis, or None.
    """

    def branch(graph: Graph) -> Callable[[], tuple[Any, ExchangeState]]:
        def run() -> tuple[Any, ExchangeState]:
            out = Exchange(Identity(), axis_name, graph=lambda _: graph)(tree, state)
            return out.aggregate, out.state

        return run

    branches = [branch(graph) for graph in pairings(collectives.axis_size(axis_name))]
    if len(branches) == 1:
        return branches[0]()
    return collectives.agreed_switch(number, branches, axis=axis_name)
