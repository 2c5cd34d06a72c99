"""The exchange: what crosses the worker axis.

``Exchange(codec, axis_name)`` runs the protocols of all leaves in lockstep. Each round of requests
becomes one transfer, however many leaves the model has; two header words ride in the first one:
whether this worker's numbers are finite, and its weight. So every worker knows whether *all*
messages of the step are good, at no collective of its own.

    leaves ──► units (stacked equal leaves, groups) ──► protocols ══ rounds ══► outcomes ──► leaves
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import _collectives as coll
from ef_optax import _context, _slices, _transfer
from ef_optax._base import (
    AllToAll,
    Array,
    Codec,
    Gather,
    Gathered,
    Max,
    Mean,
    Outcome,
    Protocol,
    Request,
    Sum,
    Workers,
    like_of,
)
from ef_optax._stack import Stacked, stackable

HEADER_WORDS = 2
"""Words that every worker adds to the first round of a step: finite flag and weight."""


class ExchangeState(NamedTuple):
    """State of one exchange."""

    count: Array  # int32 scalar: exchanges made, folded into the keys
    skipped: Array  # int32 scalar: steps skipped because some worker's numbers were not finite
    ok: Array  # bool scalar: whether the last exchange was finite on every worker
    codec: Any  # per leaf: the codec's own state; () when no codec has any


class Exchanged(NamedTuple):
    """What an exchange returns; trees shaped like the input, None where it was not wanted."""

    aggregate: Any  # what every worker applies: the weighted mean for an additive codec
    sent: Any  # what the receivers decode from this worker's message, never weighted
    residual: Any  # input minus sent
    support: Any  # boolean mask of what was sent
    ok: Array  # bool scalar, the same on all workers: all messages were finite
    state: ExchangeState


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How messages of one codec travel over one axis.

    Attributes:
      codec: the codec (or policy) for the leaves.
      axis_name: the worker axis, a tuple of axes, or None for one worker.
      normalize: ``"workers"`` divides by n, ``"present"`` by the sum of the weights.
    """

    codec: Codec
    axis_name: coll.AxisName = None
    normalize: str = "workers"

    def __post_init__(self) -> None:
        if self.normalize not in ("workers", "present"):
            raise ValueError(
                f"normalize={self.normalize!r} is not known; use 'workers' (divide by n) or "
                "'present' (divide by the sum of the weights)."
            )

    def init(self, tree: Any) -> ExchangeState:
        """The state before the first exchange of trees like ``tree``."""
        return ExchangeState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            ok=jnp.ones((), bool),
            codec=self._init_codecs(tree) if self.codec.stateful else (),
        )

    def __call__(
        self,
        tree: Any,
        state: ExchangeState,
        *,
        weight: Array | float | None = None,
        want: Sequence[str] = (),
    ) -> Exchanged:
        """Exchanges one tree.

        Args:
          tree: this worker's arrays.
          state: from :meth:`init` or the last exchange.
          weight: this worker's weight in the mean (None: one for all).
          want: which of ``"sent"``, ``"residual"``, ``"support"`` to compute.

        Returns:
          The :class:`Exchanged`. If any worker's input is not finite, ``ok`` is False and the
          aggregate is NaN in every entry (loud), unless the lift undoes the step.
        """
        coll.require_local(tree, self.axis_name)
        located, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [_context.path_string(path) for path, _ in located]
        leaves = [leaf for _, leaf in located]
        for path, leaf in zip(paths, leaves, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"updates['{path}'] has dtype {leaf.dtype}, but only floating-point leaves can "
                    "be exchanged; keep other leaves out with optax.masked inside the chain."
                )
        states = treedef.flatten_up_to(state.codec) if self.codec.stateful else [()] * len(leaves)

        def send(leaves: list[Array], states: list[Any], shared: Any, slices: list[Any]) -> Any:
            finite, weight, count = shared
            run = _Run(self, paths, slices, specs or [None] * len(leaves), count)
            return run(leaves, states, finite, weight, tuple(want))

        specs = _slices.leaf_specs(paths)
        weight = None if weight is None else jnp.asarray(weight, jnp.float32)
        shared = (all_finite(leaves), weight, state.count)
        if specs is None:
            results, (states, ok) = send(leaves, states, shared, [0] * len(leaves))
        else:
            names = ("aggregate", *want)
            results, (states, ok) = _slices.over_slices(send, leaves, states, shared, specs, names)
        lift = _context.current()
        if lift is None or not lift.guarded:
            results["aggregate"] = [jnp.where(ok, x, jnp.nan) for x in results["aggregate"]]
        trees = {name: treedef.unflatten(xs) for name, xs in results.items()}
        return Exchanged(
            aggregate=trees["aggregate"],
            sent=trees.get("sent"),
            residual=trees.get("residual"),
            support=trees.get("support"),
            ok=ok,
            state=ExchangeState(
                count=state.count + 1,
                skipped=state.skipped + jnp.where(ok, 0, 1).astype(jnp.int32),
                ok=ok,
                codec=treedef.unflatten(states) if self.codec.stateful else (),
            ),
        )

    def _init_codecs(self, tree: Any) -> Any:
        located, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [_context.path_string(path) for path, _ in located]
        likes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in located]
        specs = _slices.leaf_specs(paths)
        if specs is not None:
            likes = [_slices.slice_like(x, spec) for x, spec in zip(likes, specs, strict=True)]
        states = []
        for i, (path, like) in enumerate(zip(paths, likes, strict=True)):
            state = self.codec.for_leaf(path, like).init(like, path)
            if specs is not None and _context.spec_axes(specs[i]):
                count = _slices.slice_count(specs[i])
                state = jax.tree.map(lambda x, c=count: jnp.stack([x] * c), state)
            states.append(state)
        return treedef.unflatten(states)


def all_finite(leaves: Sequence[Array]) -> Array:
    """Whether every number is finite: a NaN or inf survives the product with zero and the sum."""
    checks = [jnp.isfinite(jnp.sum(x * jnp.zeros((), x.dtype))) for x in leaves if x.size]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)


# ---------------------------------------------------------------------------- units


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Leaves that one protocol handles: one leaf, equal leaves stacked, or a codec's group."""

    codec: Codec
    members: tuple[int, ...]
    kind: str  # "leaf", "stack" or "group"

    def take(self, values: Sequence[Any]) -> Any:
        own = [values[i] for i in self.members]
        if self.kind == "leaf":
            return own[0]
        return own if self.kind == "group" else jax.tree.map(lambda *xs: jnp.stack(xs), *own)

    def give(self, value: Any) -> list[Any]:
        if self.kind == "leaf":
            return [value]
        return list(value) if self.kind == "group" else [value[i] for i in range(len(self.members))]


def _units(
    codec: Codec, paths: Sequence[str], leaves: Sequence[Array], specs: Sequence[Any]
) -> list[_Unit]:
    """Groups the leaves; equal small leaves are stacked to keep the program short to compile."""
    groups: dict[Any, list[int]] = {}
    codecs = [codec.for_leaf(p, like_of(x)) for p, x in zip(paths, leaves, strict=True)]
    for i, (one, x) in enumerate(zip(codecs, leaves, strict=True)):
        if one.granularity == "group":
            key: Any = ("group", _identity(one))
        elif stackable(one, x):
            key = ("stack", _identity(one), x.shape, x.dtype, specs[i])
        else:
            key = ("leaf", i)
        groups.setdefault(key, []).append(i)
    units = []
    for (kind, *_), members in groups.items():
        one = codecs[members[0]]
        if kind == "stack" and len(members) > 1:
            units.append(_Unit(Stacked(one), tuple(members), "stack"))
        else:
            units.append(_Unit(one, tuple(members), "group" if kind == "group" else "leaf"))
    return units


def _identity(codec: Codec) -> Any:
    """Equal for codecs that do the same: by value, but by object for fields that are arrays."""
    fields = [getattr(codec, f.name) for f in dataclasses.fields(codec)]
    return type(codec), *(_field_identity(v) for v in fields)


def _field_identity(value: Any) -> Any:
    if isinstance(value, Codec):
        return _identity(value)
    return value if isinstance(value, int | float | str | bool | tuple | None) else id(value)


# ---------------------------------------------------------------------------- one step


@dataclasses.dataclass(frozen=True)
class _Run:
    """One exchange of a list of leaves, after the model axes are out of sight."""

    exchange: Exchange
    paths: Sequence[str]
    slices: Sequence[Array | int]
    specs: Sequence[Any]
    step: Array

    def __call__(
        self,
        leaves: list[Array],
        states: list[Any],
        finite: Array,
        weight: Array | None,
        want: tuple[str, ...],
    ) -> tuple[dict[str, list[Array]], tuple[list[Any], Array]]:
        units = _units(self.exchange.codec, self.paths, leaves, self.specs)
        protocols = [
            u.codec.protocol(u.take(leaves), u.take(states), self._workers(u)) for u in units
        ]
        rounds = _Rounds(self.exchange, finite, weight)
        outcomes = rounds.drive(protocols)
        results: dict[str, list[Any]] = {n: [None] * len(leaves) for n in ("aggregate", *want)}
        after: list[Any] = [()] * len(leaves)
        for unit, outcome in zip(units, outcomes, strict=True):
            self._put(results["aggregate"], unit, outcome.aggregate)
            for name in want:
                self._put(results[name], unit, getattr(outcome, name)())
            if unit.codec.stateful:
                self._put(after, unit, outcome.state)
        return results, (after, rounds.ok)

    def _workers(self, unit: _Unit) -> Workers:
        axis = self.exchange.axis_name
        hashes = [np.uint32(zlib.crc32(self.paths[i].encode())) for i in unit.members]
        return Workers(
            size=coll.axis_size(axis),
            index=coll.axis_index(axis),
            step=self.step,
            path=np.asarray(hashes) if unit.kind == "stack" else hashes[0],
            slice_index=self.slices[unit.members[0]],
        )

    @staticmethod
    def _put(target: list[Any], unit: _Unit, value: Any) -> None:
        for i, part in zip(unit.members, unit.give(value), strict=True):
            target[i] = part


@dataclasses.dataclass
class _Rounds:
    """Advances the protocols of one step together; trace-time object of one call."""

    exchange: Exchange
    finite: Array
    weight: Array | None
    ok: Array = dataclasses.field(init=False)
    weights: Array | None = dataclasses.field(init=False, default=None)
    total: Array | int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.ok = self.finite
        self.total = coll.axis_size(self.exchange.axis_name)

    def drive(self, protocols: Sequence[Protocol]) -> list[Outcome]:
        """Runs all protocols to their end and returns their outcomes."""
        outcomes: dict[int, Outcome] = {}
        pending: dict[int, Request] = {}
        for i, protocol in enumerate(protocols):
            self._advance(i, protocol, None, pending, outcomes)
        first = True
        while pending or (first and protocols):
            order = list(pending)
            answers = self._serve([pending[i] for i in order], first)
            pending = {}
            for i, answer in zip(order, answers, strict=True):
                self._advance(i, protocols[i], answer, pending, outcomes)
            first = False
        return [outcomes[i] for i in range(len(protocols))]

    @staticmethod
    def _advance(
        i: int, protocol: Protocol, answer: Any, pending: dict[int, Request], outcomes: Any
    ) -> None:
        try:
            pending[i] = protocol.send(answer)
        except StopIteration as stop:
            outcomes[i] = stop.value

    def _serve(self, requests: list[Request], first: bool) -> list[Any]:
        """One round: fuse by kind, transfer, answer."""
        axis, size = self.exchange.axis_name, coll.axis_size(self.exchange.axis_name)
        kinds: dict[type, list[int]] = {}
        for i, request in enumerate(requests):
            kind = Sum if isinstance(request, Mean) else type(request)
            kinds.setdefault(kind, []).append(i)
        raw: dict[int, Any] = {}
        carrier = self._carrier(kinds) if first else None
        transfers = {
            AllToAll: (_transfer.exchange_trees, self._rows),
            Gather: (_transfer.gather_trees, self._words),
            Sum: (_transfer.sum_trees, self._flag),
            Max: (_transfer.max_trees, None),
        }
        for kind, (transfer, header) in transfers.items():
            members = kinds.get(kind, [])
            trees = [self._outgoing(requests[i]) for i in members]
            if carrier is kind and header is not None:
                *received, head = transfer([*trees, header(size, trees)], axis)
                self._read_header(head)
            elif members:
                received = transfer(trees, axis)
            else:
                received = []
            raw.update(zip(members, received, strict=True))
        return [self._incoming(requests[i], raw[i]) for i in range(len(requests))]

    def _carrier(self, kinds: dict[type, list[int]]) -> type:
        """Which transfer of the first round takes the header along."""
        if AllToAll in kinds:
            return AllToAll
        return Gather if Gather in kinds or self.weight is not None else Sum

    # The header in the form of each carrier. Sums cannot tell weights apart, hence _carrier.

    def _words(self, size: int, trees: Any) -> Array:
        del size, trees
        weight = jnp.asarray(1.0 if self.weight is None else self.weight, jnp.float32)
        word = jax.lax.bitcast_convert_type(weight, jnp.uint32)
        return jnp.stack([self.finite.astype(jnp.uint32), word])

    def _rows(self, size: int, trees: Any) -> Array:
        words = self._words(size, trees)
        return jnp.broadcast_to(words, (size, HEADER_WORDS))

    def _flag(self, size: int, trees: Any) -> Array:
        del size
        dtypes = [x.dtype for x in jax.tree.leaves(trees)]
        dtype = jnp.float32 if jnp.float32 in dtypes or not dtypes else dtypes[0]
        return jnp.where(self.finite, 0, 1).astype(dtype)

    def _read_header(self, head: Array) -> None:
        if head.ndim == 0:  # a sum of "not finite" flags
            self.ok = head == 0
            return
        self.ok = jnp.all(head[:, 0] == 1)
        if self.weight is not None:
            self.weights = jax.lax.bitcast_convert_type(head[:, 1], jnp.float32)
            if self.exchange.normalize == "present":
                self.total = jnp.maximum(jnp.sum(self.weights), jnp.finfo(jnp.float32).tiny)

    def _outgoing(self, request: Request) -> Any:
        if isinstance(request, Mean):
            if self.weight is None:
                return request.value
            return jax.tree.map(
                lambda x: x * jnp.asarray(self.weight).astype(x.dtype), request.value
            )
        return request.value if isinstance(request, Sum | Max) else request.message

    def _incoming(self, request: Request, received: Any) -> Any:
        if isinstance(request, Gather):
            return Gathered(received, self.weights, self.total)
        if isinstance(request, Mean):
            return jax.tree.map(lambda x: x / jnp.asarray(self.total, x.dtype), received)
        return received
