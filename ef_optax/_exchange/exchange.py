"""The exchange: what crosses the worker axis.

``Exchange(codec, axis_name)`` runs the protocols of all leaves in lockstep. Each round of requests
becomes one transfer, however many leaves the model has. Two header words travel in the first one:
whether this worker's numbers are finite, and its weight. So every worker knows whether *all*
messages of the step are good, without a further collective.

    leaves ──► bundles (stacks of equal leaves, groups) ─► protocols ══ rounds ═► outcomes ─► leaves

If codecs change with the step (``scheduled``), each phase is a complete exchange, and the step
count chooses between them. So no request is yielded under a condition, and only the chosen phase is
executed.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core import context
from ef_optax._core.codec import Codec
from ef_optax._core.joinable import JointCodec
from ef_optax._core.once import identity_of
from ef_optax._core.outcome import Outcome
from ef_optax._core.policy import Stage, for_leaves, stages_of
from ef_optax._core.timeline import merged
from ef_optax._core.workers import Workers
from ef_optax._exchange import collectives as coll
from ef_optax._exchange import controlled, monitored, slices
from ef_optax._exchange.bundles import Bundle, bundles_of, states_of
from ef_optax._exchange.neighbours import Graph, NeighbourRounds
from ef_optax._exchange.rounds import Rounds
from ef_optax._exchange.traffic import NOTHING, Bits, divided
from ef_optax._numeric import check, offsets
from ef_optax._numeric.dtypes import FLOATING_ONLY, Array
from ef_optax._numeric.finite import all_finite
from ef_optax._numeric.shapes import like_of
from ef_optax._numeric.trees import widest


class ExchangeState(NamedTuple):
    """State of one exchange."""

    step: Array  # int32 scalar: exchanges made, folded into the keys
    skipped: Array  # int32 scalar: steps skipped because some worker's numbers were bad
    ok: Array  # bool scalar: whether the last exchange was finite on every worker
    codec: Any  # per leaf: the codec's own state; () if no codec has a state
    monitor: Any = ()  # a MonitorState if the rule is in ef_optax.monitor, else ()
    control: Any = ()  # a ControlState if a controller chooses the codec, else ()


class Exchanged(NamedTuple):
    """The result of an exchange: trees like the input, or None for what was not requested."""

    aggregate: Any  # what every worker applies: the weighted mean for an additive codec
    sent: Any  # what the receivers decode from this worker's message, without its weight
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
      graph: the graph of a number of workers, if only neighbours hear each other; the aggregate is
        then each worker's own. None if all workers hear all others.
      estimates: whether the rule keeps the mean of all workers' estimates. Workers that are absent
        from a step stay in it then, and the divisor is n; else the mean is over those present.
    """

    codec: Codec
    axis_name: coll.AxisName = None
    normalize: str = "workers"
    graph: Callable[[int], Graph] | None = None
    estimates: bool = False

    def __post_init__(self) -> None:
        check.axis(self.axis_name)
        if self.normalize not in ("workers", "present"):
            raise ValueError(
                f"normalize={self.normalize!r} is not known; use 'workers' (divide by n) or "
                "'present' (divide by the sum of the weights)."
            )

    def init(self, tree: Any) -> ExchangeState:
        """The state before the first exchange of trees like ``tree``."""
        return ExchangeState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            ok=jnp.ones((), bool),
            codec=_or_nothing(self._init_codecs(tree), tree) if self.codec.stateful else (),
            monitor=monitored.begin(tree),
            control=controlled.begin(self, tree),
        )

    def __call__(
        self,
        tree: Any,
        state: ExchangeState,
        *,
        weight: Array | float | None = None,
        want: Sequence[str] = (),
        again: Callable[[], Any] | None = None,
    ) -> Exchanged:
        """Exchanges one tree.

        Args:
          tree: this worker's arrays.
          state: from :meth:`init` or the last exchange.
          weight: this worker's weight in the mean (None: every worker has weight 1).
          want: which of ``"sent"``, ``"residual"``, ``"support"`` to compute.
          again: computes ``tree`` a second time, for codecs whose residual streams through it.

        Returns:
          The :class:`Exchanged`. If any worker's input is not finite, ``ok`` is False, and every
          entry of the aggregate is NaN unless the lift undoes the step.
        """
        coll.require_local(tree, self.axis_name)
        self, weight = self._among_present(weight)
        located, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [context.path_string(path) for path, _ in located]
        leaves = [leaf for _, leaf in located]
        for path, leaf in zip(paths, leaves, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"updates['{path}'] has dtype {leaf.dtype}, {FLOATING_ONLY}")
        states = [()] * len(leaves)
        if self.codec.stateful:
            known = state.codec if jax.tree.leaves(state.codec) else self._init_codecs(tree)
            states = treedef.flatten_up_to(known)

        def leaves_again() -> list[Array] | None:
            if again is None or specs is not None:  # a map over slices must not close over arrays
                return None
            return treedef.flatten_up_to(again())

        def send(leaves: list[Array], states: list[Any], shared: Any, slices: list[Any]) -> Any:
            header, weight, count, clock, look = shared
            leaf_specs = specs or [None] * len(leaves)
            known = count, clock, leaves_again, nan_if_bad, look
            run = _Run(self, paths, slices, leaf_specs, *known)
            return run(leaves, states, header, weight, names)

        record = monitored.applies(state.monitor, treedef)
        names = monitored.names(state.monitor, want) if record else tuple(want)
        lift = context.current()
        nan_if_bad = lift is None or not lift.guarded
        specs = slices.leaf_specs(paths)
        weight = None if weight is None else jnp.asarray(weight, widest(leaves))
        # All slices of a leaf share one flag; for a leaf that is not split the codec may know it.
        finite = None if specs is None else all_finite(leaves)
        reaches_all = lift is not None and set(lift.axes) <= set(coll.axis_names(self.axis_name))
        accepted = lift.accepted if lift is not None and reaches_all else None
        look = monitored.look(state.monitor, state.step) if record else None
        clock = controlled.clock(self.codec, state.control, state.step)
        shared = ((finite, accepted), weight, state.step, clock, look)
        if specs is None:
            results, (states, (ok, seen, sums)) = send(leaves, states, shared, [0] * len(leaves))
        else:
            results, (states, (ok, seen, sums)) = slices.over_slices(
                send, leaves, states, shared, specs, ("aggregate", *names)
            )
        monitor = state.monitor
        if record:
            weighting = {"weight": weight, "normalize": self.normalize}
            monitor = monitored.after(monitor, seen, leaves, results, self.axis_name, **weighting)
        trees = {name: treedef.unflatten(results[name]) for name in ("aggregate", *want)}
        return Exchanged(
            aggregate=trees["aggregate"],
            sent=trees.get("sent"),
            residual=trees.get("residual"),
            support=trees.get("support"),
            ok=ok,
            state=ExchangeState(
                step=state.step + 1,
                skipped=state.skipped + jnp.where(ok, 0, 1).astype(jnp.int32),
                ok=ok,
                codec=_or_nothing(treedef.unflatten(states), tree) if self.codec.stateful else (),
                monitor=monitor,
                control=controlled.after(self, state.control, sums, tree),
            ),
        )

    def _among_present(self, weight: Any) -> tuple[Exchange, Any]:
        """This exchange and a worker's weight in it, among the workers that are present."""
        lift = context.current()
        if lift is None or lift.present is None or self.axis_name is None:
            return self, weight
        if set(lift.axes) != set(coll.axis_names(self.axis_name)):
            raise ValueError(
                f"present is given, but an exchange over {self.axis_name!r} reaches only some of "
                f"the workers along {lift.axes}: groups of unequal size would count alike. Leave "
                "out present, or use one exchange over all worker axes."
            )
        own = lift.present.astype(jnp.float32)
        weight = own if weight is None else weight * own.astype(jnp.result_type(weight))
        normalize = self.normalize if self.estimates else "present"
        return dataclasses.replace(self, normalize=normalize), weight

    def located(self, tree: Any) -> tuple[list[str], list[jax.ShapeDtypeStruct], Any]:
        """Paths of the leaves, shape and dtype of what a codec gets of each, and the treedef."""
        located, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [context.path_string(path) for path, _ in located]
        likes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in located]
        specs = slices.leaf_specs(paths)
        if specs is not None:
            likes = [slices.slice_like(x, spec) for x, spec in zip(likes, specs, strict=True)]
        return paths, likes, treedef

    def _init_codecs(self, tree: Any) -> Any:
        paths, likes, treedef = self.located(tree)
        specs = slices.leaf_specs(paths)
        workers = coll.bound_size(self.axis_name)
        codecs = for_leaves(self.codec, paths, likes, workers)
        states = states_of(codecs, likes, paths, workers)
        for i, spec in enumerate(specs or ()):
            if context.spec_axes(spec):
                count = slices.slice_count(spec)
                states[i] = jax.tree.map(lambda x, c=count: jnp.stack([x] * c), states[i])
        return treedef.unflatten(states)


def _or_nothing(states: Any, tree: Any) -> Any:
    """``()`` for states without arrays.

    So the states of all stateless codecs have one form, and a policy that is chosen in the middle
    of a run goes on with the memories of the rule. A tree without leaves, such as the placeholder
    of ``optax.tree.map_params``, says nothing about the codecs and is returned as it is.
    """
    return states if jax.tree.leaves(states) or not jax.tree.leaves(tree) else ()


# ---------------------------------------------------------------------------- one step


@dataclasses.dataclass(frozen=True)
class _Run:
    """One exchange of a list of leaves, which are slices if parameters are split."""

    exchange: Exchange
    paths: Sequence[str]
    slices: Sequence[Array | int]
    specs: Sequence[Any]
    step: Array
    clock: Array  # what chooses the stage: the step, or the level of a controlled codec
    again: Callable[[], list[Array] | None]  # computes the leaves a second time, if possible
    nan_if_bad: bool  # whether aggregates become NaN if some worker's numbers are not finite
    look: monitored.Look | None  # what a monitored exchange needs to record itself

    def __call__(
        self,
        leaves: list[Array],
        states: list[Any],
        header: tuple[Array | None, Array | None],
        weight: Array | None,
        want: tuple[str, ...],
    ) -> tuple[dict[str, list[Array]], tuple[list[Any], tuple[Array, Any, Any]]]:
        codec, workers = self.exchange.codec, coll.axis_size(self.exchange.axis_name)
        chosen = for_leaves(codec, self.paths, [like_of(x) for x in leaves], workers)
        plans = [stages_of(one) for one in chosen]
        timeline = merged([plan.timeline for plan in plans])
        phases: dict[Any, list[Stage]] = {}  # what differs between the segments -> its stages
        segments = []
        for start in timeline.starts():
            stages = [plan.at(start) for plan in plans]
            phase = tuple((identity_of(stage.codec), stage.slot) for stage in stages)
            phases.setdefault(phase, stages)
            segments.append(list(phases).index(phase))

        def run(stages: list[Stage]) -> Any:
            own = [stage.own(state) for stage, state in zip(stages, states, strict=True)]
            codecs = [stage.codec for stage in stages]
            results, after, rest = self._stage(codecs, leaves, own, header, weight, want)
            changes = zip(stages, states, after, strict=True)
            after = [stage.replaced(state, new) for stage, state, new in changes]
            return results, (after, rest)

        if len(phases) == 1:
            return run(*phases.values())
        index = jnp.asarray(segments, jnp.int32)[timeline.segment(self.clock)]
        branches = [functools.partial(run, stages) for stages in phases.values()]
        return coll.agreed_switch(index, branches, axis=self.exchange.axis_name)

    def _stage(
        self,
        codecs: Sequence[Codec],
        leaves: list[Array],
        states: list[Any],
        header: tuple[Array | None, Array | None],
        weight: Array | None,
        want: tuple[str, ...],
    ) -> tuple[dict[str, list[Array]], list[Any], tuple[Array, Any, Any]]:
        """One exchange with these codecs: results, states, and what is the same for all leaves."""
        axis = self.exchange.axis_name
        bundles = bundles_of(codecs, leaves, self.specs, self.paths)
        taken = [b.take(leaves) for b in bundles]
        protocols = [
            b.codec.protocol(x, b.take(states), self._workers(b))
            for b, x in zip(bundles, taken, strict=True)
        ]
        rounds = self._rounds(header, weight)
        outcomes = rounds.drive(protocols, taken)
        again = functools.cache(self.again)  # once per stage: switch branches share no arrays

        def value(bundle: Bundle, outcome: Outcome, name: str) -> Any:
            """A result of a bundle. To stream its residual, a codec gets a copy of its leaves."""
            streams = name == "residual" and bundle.codec.streams
            copies = again() if streams else None
            return getattr(outcome, name)(*(() if copies is None else (bundle.take(copies),)))

        def result(name: str) -> list[Array]:
            """A result of all leaves, for the record."""
            found: list[Any] = [None] * len(leaves)
            for bundle, outcome in zip(bundles, outcomes, strict=True):
                self._put(found, bundle, value(bundle, outcome, name), rows)
            return coll.to_varying(found, axis)

        results: dict[str, list[Any]] = {n: [None] * len(leaves) for n in ("aggregate", *want)}
        after: list[Any] = [()] * len(leaves)
        most = max((len(b.members) for b in bundles if b.kind == "stack"), default=0)
        rows = offsets.as_data(range(most), self.step) if most else []
        for bundle, outcome in zip(bundles, outcomes, strict=True):
            aggregate = outcome.aggregate
            if self.nan_if_bad:
                aggregate = jax.tree.map(lambda x: jnp.where(rounds.ok, x, jnp.nan), aggregate)
            self._put(results["aggregate"], bundle, aggregate, rows)
            for name in want:
                self._put(results[name], bundle, value(bundle, outcome, name), rows)
            if bundle.codec.stateful:
                self._put(after, bundle, outcome.state, rows)
        # They differ between workers, so their types must too.
        results |= {name: coll.to_varying(results[name], axis) for name in want}
        split = [() if spec is None else context.spec_axes(spec) for spec in self.specs]
        seen, sums = (), ()
        if self.look is not None:
            costs = self._costs(codecs, leaves, bundles, rounds.bits)
            seen = monitored.seen(self.look, leaves, result, results, costs, split, axis), costs
        if controlled.measures(self.exchange.codec):
            errors = results["residual"] if "residual" in want else result("residual")
            sums = controlled.measured(leaves, errors, split, axis)
        return results, after, (rounds.ok, seen, sums)

    def _rounds(self, header: tuple[Array | None, Array | None], weight: Array | None) -> Rounds:
        axis, graph = self.exchange.axis_name, self.exchange.graph
        if graph is None:
            return Rounds(axis, self.exchange.normalize, *header, weight)
        joined = graph(coll.axis_size(axis))
        return NeighbourRounds(axis, self.exchange.normalize, *header, weight, graph=joined)

    def _costs(
        self,
        codecs: Sequence[Codec],
        leaves: list[Array],
        bundles: list[Bundle],
        spent: dict[int, Bits],
    ) -> monitored.Costs:
        """What each leaf cost this worker, over all slices; a bundle's cost is divided by size."""
        bits, workers = [NOTHING] * len(leaves), coll.axis_size(self.exchange.axis_name)
        for number, bundle in enumerate(bundles):
            members = bundle.members
            of_bundle = spent.get(number, NOTHING)
            shares = bundle.shares(codecs, leaves)
            parts = [divided(total, shares) for total in of_bundle]
            for i, *of_leaf in zip(members, *parts, strict=True):
                spec = self.specs[i]
                count = 1 if spec is None else slices.slice_count(spec)
                bits[i] = Bits(*(count * x for x in of_leaf))
        promised = [c.alpha(x.shape, workers) for c, x in zip(codecs, leaves, strict=True)]
        return monitored.costs_of(bits, promised)

    def _workers(self, bundle: Bundle) -> Workers:
        axis = self.exchange.axis_name
        each = bundle.kind == "stack" or isinstance(bundle.codec, JointCodec)
        hashes = [np.uint32(zlib.crc32(self.paths[i].encode())) for i in bundle.members]
        return Workers(
            size=coll.axis_size(axis),
            index=coll.axis_index(axis),
            step=self.step,
            path=np.asarray(hashes) if each else hashes[0],
            slice_index=self.slices[bundle.members[0]],
        )

    @staticmethod
    def _put(target: list[Any], bundle: Bundle, value: Any, rows: Sequence[Any]) -> None:
        for i, part in zip(bundle.members, bundle.give(value, rows), strict=True):
            target[i] = part
