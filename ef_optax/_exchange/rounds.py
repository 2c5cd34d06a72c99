"""The rounds of one step: protocols advance in lockstep, with one transfer of each kind per round.

Two header words travel in the first round that reaches all workers: whether this worker's numbers
are finite, and its weight. So every worker knows whether *all* messages of the step are good,
without a further collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import AllToAll, Gather, Gathered, Max, Mean, Permute, Request, Sum
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.traffic import NOTHING, Bits, bits_of_request
from ef_optax._exchange.transfer import (
    exchange_trees,
    gather_trees,
    max_trees,
    permute_trees,
    sum_trees,
)
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite

HEADER_WORDS = 2
"""Words that every worker adds to one round of a step: the finite flag and the weight."""


@dataclasses.dataclass
class Rounds:
    """Advances the protocols of one step together; it exists only while one call is traced.

    ``finite`` is whether this worker's numbers are finite; if None, each leaf's protocol is asked.
    ``accepted`` is whether the lift accepts its gradients; None if it has not checked them.
    """

    axis: coll.AxisName
    normalize: str
    finite: Array | None
    accepted: Array | None
    weight: Array | None
    ok: Array = dataclasses.field(init=False)
    weights: Array | None = dataclasses.field(init=False, default=None)
    total: Array | int = dataclasses.field(init=False)
    header_due: bool = dataclasses.field(init=False, default=True)
    inputs: Sequence[Any] = dataclasses.field(init=False, default=())
    flags: dict[int, Array] = dataclasses.field(init=False, default_factory=dict)
    bits: dict[int, Bits] = dataclasses.field(init=False, default_factory=dict)  # by protocol

    def __post_init__(self) -> None:
        self.ok = jnp.ones((), bool)
        self.total = coll.axis_size(self.axis)

    def drive(self, protocols: Sequence[Protocol], inputs: Sequence[Any]) -> list[Outcome]:
        """Runs the protocols of these inputs to their end and returns their outcomes."""
        outcomes: dict[int, Outcome] = {}
        pending: dict[int, Request] = {}
        self.inputs = inputs
        for i, protocol in enumerate(protocols):
            self._advance(i, protocol, None, pending, outcomes)
        while pending or (self.header_due and protocols):
            order = list(pending)
            for i in order:
                self.bits[i] = self.bits.get(i, NOTHING).plus(self._cost(pending[i]))
            answers = self._serve([pending[i] for i in order])
            pending = {}
            for i, answer in zip(order, answers, strict=True):
                self._advance(i, protocols[i], answer, pending, outcomes)
        return [outcomes[i] for i in range(len(protocols))]

    def _advance(
        self, i: int, protocol: Protocol, answer: Any, pending: dict[int, Request], outcomes: Any
    ) -> None:
        try:
            request = pending[i] = protocol.send(answer)
        except StopIteration as stop:
            outcomes[i] = stop.value
        else:
            if isinstance(request, Gather) and request.finite is not None:
                self.flags.setdefault(i, request.finite)

    def _cost(self, request: Request) -> Bits:
        """What one worker pays for a request."""
        return bits_of_request(request, coll.axis_size(self.axis))

    def _good(self) -> Array:
        """Whether this worker's gradients are accepted and its numbers finite."""
        finite = self._all_finite() if self.finite is None else self.finite
        return finite if self.accepted is None else finite & self.accepted

    def _all_finite(self) -> Array:
        """Whether this worker's numbers are finite; only leaves without a known flag are read."""
        unknown = [x for i, x in enumerate(self.inputs) if i not in self.flags]
        known = list(self.flags.values())
        return jnp.all(jnp.stack([*known, all_finite(jax.tree.leaves(unknown), local=True)]))

    def _serve(self, requests: list[Request]) -> list[Any]:
        """One round: fuse by kind, transfer, answer."""
        axis, size = self.axis, coll.axis_size(self.axis)
        kinds: dict[type, list[int]] = {}
        early: list[int] = []
        for i, request in enumerate(requests):
            if isinstance(request, Gather) and request.early:
                early.append(i)
                continue
            kind = Sum if isinstance(request, Mean) else type(request)
            kinds.setdefault(kind, []).append(i)
        raw = self._gather_early(requests, early)
        carrier = self._carrier(kinds) if self.header_due else None
        transfers = {
            AllToAll: (exchange_trees, None),
            Gather: (gather_trees, self._words),
            Sum: (sum_trees, self._flag),
            Max: (max_trees, None),
        }
        for kind, (transfer, header) in transfers.items():
            members = kinds.get(kind, [])
            trees = [self._outgoing(requests[i]) for i in members]
            if carrier is kind and header is not None:
                *received, head = transfer([*trees, header(size, trees)], axis)
                self._read_header(head)
            elif kind is AllToAll and members and self.weight is not None:
                own = jnp.full((size,), self.weight, self.weight.dtype)  # one word with each row
                *received, weights = transfer([*trees, own], axis)
                self._weigh(weights)
            elif members:
                received = transfer(trees, axis)
            else:
                received = []
            raw.update(zip(members, received, strict=True))
        raw.update(self._permute(requests, kinds.get(Permute, [])))
        return [self._incoming(requests[i], raw[i]) for i in range(len(requests))]

    def _gather_early(self, requests: list[Any], members: list[int]) -> dict[int, Any]:
        """One transfer for all messages of an earlier step, which waits for nothing of this one."""
        if members and self.weight is not None:
            raise ValueError(
                "weight is not None, but a message of the step before (exchanges.delayed) carries "
                "no weight; leave out delayed, or the weights."
            )
        received = gather_trees([requests[i].message for i in members], self.axis)
        return dict(zip(members, received, strict=True))

    def _permute(self, requests: list[Any], members: list[int]) -> dict[int, Any]:
        """One transfer for all messages that go between the same workers."""
        if members and self.weight is not None:
            raise ValueError(
                "weight is not None, but messages that are merged on their way (Permute) carry no "
                "weights; choose a compressor whose messages are gathered or summed."
            )
        received = {}
        for pairs in dict.fromkeys(requests[i].pairs for i in members):
            own = [i for i in members if requests[i].pairs == pairs]
            trees = [requests[i].message for i in own]
            answers = permute_trees(trees, pairs, self.axis)
            received.update(zip(own, answers, strict=True))
        return received

    def _carrier(self, kinds: dict[type, list[int]]) -> type | None:
        """The transfer of this round that carries the header; None to wait for a later round.

        The results of an all_to_all or a permutation have types that differ between the workers,
        even if the values are equal, and a maximum is another collective. So the header waits for
        the gather or sum that follows.
        """
        if set(kinds) <= {AllToAll, Permute, Max} and kinds:
            return None
        return Gather if Gather in kinds or self.weight is not None else Sum

    # The header in the form of each carrier. A sum cannot carry the single weights: see _carrier.

    def _words(self, size: int, trees: Any) -> Array:
        del size, trees
        weight = jnp.ones((), jnp.float32) if self.weight is None else self.weight
        words = jax.lax.bitcast_convert_type(weight, jnp.uint32).reshape(-1)
        return jnp.concatenate([self._good().astype(jnp.uint32)[None], words])

    def _flag(self, size: int, trees: Any) -> Array:
        del size
        dtypes = [x.dtype for x in jax.tree.leaves(trees)]
        dtype = jnp.float32 if jnp.float32 in dtypes or not dtypes else dtypes[0]
        return jnp.where(self._good(), 0, 1).astype(dtype)

    def _read_header(self, head: Array) -> None:
        self.header_due = False
        if head.ndim == 0:  # a sum of "not finite" flags
            self.ok = head == 0
            return
        self.ok = jnp.all(head[:, 0] == 1)
        if self.weight is not None:
            words = head[:, 1:] if self.weight.dtype.itemsize > 4 else head[:, 1]
            self._weigh(jax.lax.bitcast_convert_type(words, self.weight.dtype))

    def _weigh(self, weights: Array) -> None:
        """Stores the weights of all workers."""
        self.weights = weights
        if self.normalize == "present":
            self.total = jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)

    def _outgoing(self, request: Request) -> Any:
        if isinstance(request, Mean):
            if self.weight is None:
                return request.value
            return jax.tree.map(
                lambda x: x * jnp.asarray(self.weight).astype(x.dtype), request.value
            )
        return request.value if isinstance(request, Sum | Max) else request.message

    def _incoming(self, request: Request, received: Any) -> Any:
        if isinstance(request, Gather | AllToAll):
            ok = None if self.header_due else self.ok
            return Gathered(received, self.weights, self.total, ok)
        if isinstance(request, Mean):
            return jax.tree.map(lambda x: x / jnp.asarray(self.total, x.dtype), received)
        return received
