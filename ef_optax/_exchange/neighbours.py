"""An exchange between neighbours: every worker hears only those that a graph joins it with.

Each worker sends one packed message to each neighbour. The edges of the graph are divided into
matchings, in which every worker sends to one worker and hears one at the most, so that a matching
is one permutation of the devices. A graph in which every worker has D neighbours needs D of them.

Nothing is common to all workers here: the aggregate is each worker's own weighted sum, and no flag
travels that would let all of them skip a step together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.requests import Gather, Gathered, Mean, Request
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.links import link_amount
from ef_optax._exchange.rounds import Rounds
from ef_optax._exchange.traffic import Bits, bits_of_request
from ef_optax._exchange.transfer import permute_trees
from ef_optax._numeric.dtypes import Array

Edge = tuple[int, int]
"""Source and target."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """Who hears whom.

    Attributes:
      weights: row i has the weights with which worker i takes what the others send; rows and
        columns sum to 1.
    """

    weights: tuple[tuple[float, ...], ...]

    @functools.cached_property
    def matchings(self) -> tuple[tuple[Edge, ...], ...]:
        """The edges between different workers, each in one matching."""
        edges = [(j, i) for i, row in enumerate(self.weights) for j, w in enumerate(row) if w]
        return matchings((edge for edge in edges if edge[0] != edge[1]), len(self.weights))

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Row i: worker i's weights of itself and of whom it hears in each matching, else 0."""
        n = len(self.weights)
        found = np.zeros((n, 1 + len(self.matchings)))
        found[:, 0] = np.diag(np.asarray(self.weights))
        for number, pairs in enumerate(self.matchings, 1):
            for source, target in pairs:
                found[target, number] = self.weights[target][source]
        return found


def matchings(edges: Iterable[Edge], n: int) -> tuple[tuple[Edge, ...], ...]:
    """Edges in as few matchings as possible: as many as the busiest worker has of one direction.

    It is König's colouring of the edges of a bipartite graph (sources and targets).

    >>> matchings([(0, 1), (1, 2), (2, 0)], 3)
    (((0, 1), (1, 2), (2, 0)),)
    >>> len(matchings([(0, 1), (0, 2), (1, 2), (2, 1)], 3))
    2
    """
    edges = sorted(edges, key=lambda edge: ((edge[1] - edge[0]) % n, edge))  # rings in one piece
    ends = [[edge[side] for edge in edges] for side in (0, 1)]
    count = max((side.count(worker) for side in ends for worker in range(n)), default=0)
    to: list[list[int | None]] = [[None] * count for _ in range(n)]  # source, colour -> target
    of: list[list[int | None]] = [[None] * count for _ in range(n)]  # target, colour -> source
    for source, target in edges:
        a, b = to[source].index(None), of[target].index(None)
        if a != b:  # then a path of edges with the colours a, b, a, ... from the target swaps them
            path, end, colour = [], target, a
            while (start := of[end][colour]) is not None:
                path.append((start, end, colour))
                other = to[start][colour := a + b - colour]
                if other is None:
                    break
                path.append((start, other, colour))
                end, colour = other, a + b - colour
            for start, end, colour in path:
                to[start][colour] = of[end][colour] = None
            for start, end, colour in path:
                to[start][a + b - colour], of[end][a + b - colour] = end, start
        to[source][a], of[target][a] = target, source
    colours = range(count)
    return tuple(
        tuple((j, i) for j in range(n) if (i := to[j][colour]) is not None) for colour in colours
    )


@dataclasses.dataclass
class NeighbourRounds(Rounds):
    """Rounds in which a worker's answers come from its neighbours and from itself.

    A gather answers with these messages, weighted by the graph, and a mean with their weighted sum.
    """

    graph: Graph = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.header_due = False
        if self.weight is not None:
            raise ValueError(
                "weight is not None, but the weights of neighbours are those of the graph."
            )

    def _cost(self, request: Request) -> Bits:
        message = bits_of_request(request, 1).message
        degree = len(self.graph.matchings)
        return Bits(degree * message, degree * link_amount("permute", 1, message))

    def _serve(self, requests: list[Request]) -> list[Any]:
        own = [self._mine(request) for request in requests]
        weights = jnp.asarray(self.graph.table, float)[coll.axis_index(self.axis)]
        rows = [own]
        for pairs in self.graph.matchings:
            received = permute_trees(own, pairs, self.axis)
            hears = {target for _, target in pairs}
            if len(hears) < len(self.graph.weights):  # a decoded zero might not be finite
                listens = jnp.asarray([i in hears for i in range(len(self.graph.weights))])
                here = listens[coll.axis_index(self.axis)]
                received = jax.tree.map(lambda x, y: jnp.where(here, x, y), received, own)  # noqa: B023
            rows.append(received)
        answers = []
        for number, request in enumerate(requests):
            heard = [row[number] for row in rows]
            if isinstance(request, Gather):
                stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *heard)
                answers.append(Gathered(stacked, weights, 1))
            else:
                answers.append(jax.tree.map(functools.partial(_weighted, weights), *heard))
        return answers

    @staticmethod
    def _mine(request: Request) -> Any:
        if isinstance(request, Gather):
            return request.message
        if isinstance(request, Mean):
            return request.value
        raise TypeError(
            f"a codec asks for {type(request).__name__} of all workers, but only neighbours hear "
            "each other here; choose one whose messages are gathered, such as top_k."
        )


def _weighted(weights: Array, *parts: Array) -> Array:
    total = weights[0].astype(parts[0].dtype) * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight.astype(part.dtype) * part
    return total
