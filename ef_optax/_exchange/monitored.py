"""What a monitored exchange records of every leaf, as part of its own state.

The record travels in the state, so it passes through conditions and loops as the state does, costs
no transfer until it is read, and is the same program in a simulation and on a mesh. Without a
monitor the state has no record, and the program is that of an exchange that knows nothing of
monitors. Every worker records its own numbers; only ``dense_mean`` needs a collective.

A record is a few matrices with a row for each leaf, and is computed from what the exchange has
anyway: the message and the residual, whose sum is the input. So the input, which the exchange reads
from gradient and residual as it goes, need not be written out for it. In exchanges that are not
recorded (``every``), all of this is behind a condition, and only the bytes are counted.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core import context
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.traffic import Bits
from ef_optax._numeric import moments
from ef_optax._numeric.dtypes import Array

MOMENTS = (*moments.MOMENTS, "message_bits", "promised_alpha")
"""The columns of ``MonitorState.moments``; no known promise is NaN."""

TRAFFIC = ("message_low", "message_high", "link_low", "link_high")
"""The columns of ``MonitorState.traffic``: the bits of all steps so far as integers of 64 bits in
two words."""

GRADIENT = ("gradient", "largest_gradient")
"""Squared norms: of the gradient that the rule received, and the largest one so far."""

DENSE = ("aggregate_product", "aggregate", "mean_input", "aggregate_error")
"""The inner product of the aggregate and the mean of the inputs, their squared norms, and that of
their difference."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is recorded besides the sums that cost one pass; see :func:`ef_optax.monitor`."""

    age: bool = False
    dense_mean: bool = False
    conservation: bool = False
    every: int = 1


class MonitorState(NamedTuple):
    """What a monitored exchange has recorded; the rows of its matrices are the leaves in order."""

    size: Any  # a tree like the input of uint32 scalars: the number of entries of each leaf
    moments: Array  # per worker, float32 (leaves, len(MOMENTS)): of the last recorded exchange
    traffic: Array  # uint32 (leaves, len(TRAFFIC)): of all exchanges
    gradient: Array  # per worker, float32 (leaves, len(GRADIENT)): of the recorded exchanges
    age: Any  # per worker, int32 like the input: exchanges since an entry was sent; () if not asked
    dense: Any  # float32 (leaves, len(DENSE)); () if not asked
    loss: Any  # per worker, float32 (leaves,): the sum of squares of input - sent - residual; or ()
    every: Any  # int32 scalar: the first of so many exchanges is recorded; () if all are


_WANTED: contextvars.ContextVar[Wanted | None] = contextvars.ContextVar(
    "ef_optax_monitor", default=None
)


@contextlib.contextmanager
def monitoring(wanted: Wanted) -> Iterator[None]:
    """Exchange states that are made in this context have a record."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def begin(tree: Any) -> Any:
    """The record of an exchange of trees like this one; () if nobody asks for one."""
    wanted = _WANTED.get()
    if wanted is None:
        return ()
    rows = len(jax.tree.leaves(tree))
    return MonitorState(
        size=jax.tree.map(lambda x: jnp.asarray(x.size, jnp.uint32), tree),
        moments=jnp.zeros((rows, len(MOMENTS)), jnp.float32),
        traffic=jnp.zeros((rows, len(TRAFFIC)), jnp.uint32),
        gradient=jnp.zeros((rows, len(GRADIENT)), jnp.float32),
        age=jax.tree.map(lambda x: jnp.zeros_like(x, jnp.int32), tree) if wanted.age else (),
        dense=jnp.zeros((rows, len(DENSE)), jnp.float32) if wanted.dense_mean else (),
        loss=jnp.zeros(rows, jnp.float32) if wanted.conservation else (),
        every=jnp.asarray(wanted.every, jnp.int32) if wanted.every > 1 else (),
    )


def asked(field: Any) -> bool:
    """Whether a field of a record is in use; () says that nobody asked for it."""
    return not (isinstance(field, tuple) and field == ())


def applies(monitor: Any, treedef: Any) -> bool:
    """Whether a tree of this structure is recorded; rules also send trees of other kinds."""
    return bool(monitor) and jax.tree.structure(monitor.size) == treedef


def names(monitor: MonitorState, want: Sequence[str]) -> tuple[str, ...]:
    """The results of an exchange that are needed besides those that the rule wants."""
    return tuple(dict.fromkeys((*want, *(("support",) if asked(monitor.age) else ()))))


class Costs(NamedTuple):
    """What an exchange costs, for each leaf; known when it is traced."""

    bits: Array  # uint32 (leaves, 4): of message and link, each as a low and a high word
    facts: Array  # float32 (leaves, 2): the bits of the message, and the promised contraction


def costs_of(bits: Sequence[Bits], promised: Sequence[float | None]) -> Costs:
    """The costs of an exchange from the bits of each leaf and the contraction of its codec."""
    words = [[x & _WORD, x >> 32, y & _WORD, y >> 32] for x, y in bits]
    facts = [
        [one.message, np.nan if alpha is None else alpha]
        for one, alpha in zip(bits, promised, strict=True)
    ]
    return Costs(
        jnp.asarray(np.asarray(words, np.uint32).reshape(-1, 4)),
        jnp.asarray(np.asarray(facts, np.float32).reshape(-1, 2)),
    )


class Look(NamedTuple):
    """What an exchange is given to record itself; the same on all slices of a leaf."""

    due: Any  # bool scalar: whether this exchange is recorded; () if all are
    moments: Array  # the rows of the last record
    loss: Any


def look(monitor: MonitorState, step: Array) -> Look:
    """What exchange number ``step`` needs to record itself."""
    due = step % monitor.every == 0 if asked(monitor.every) else ()
    return Look(due, monitor.moments, monitor.loss)


def seen(
    before: Look,
    leaves: Sequence[Array],
    result: Callable[[str], list[Array]],
    known: Mapping[str, list[Array]],
    costs: Costs,
    split: Sequence[tuple[str, ...]],
    axis: coll.AxisName,
) -> Look:
    """The rows of ``MonitorState.moments`` and ``loss`` after an exchange.

    Args:
      before: what :func:`look` gave.
      leaves: the input of the exchange, or one device's slices of it.
      result: computes a result of the exchange by name, a list like ``leaves``.
      known: the results that the rule wanted, computed already.
      costs: what the exchange cost.
      split: the model axes over which each leaf is split.
      axis: the worker axis.
    """
    checked, always = asked(before.loss), not asked(before.due)

    def record() -> tuple[Array, Any]:
        inputs, sent, errors = leaves, known.get("sent"), known.get("residual")
        if errors is None and (checked or sent is None):
            errors = result("residual")
        if sent is None and checked:
            sent = result("sent")
        if sent is None and always:
            sent = [p - r for p, r in zip(inputs, errors or (), strict=True)]
        elif sent is None:
            sent = _written(before.due, result, leaves)
            inputs = [c + r for c, r in zip(sent, errors or (), strict=True)]
        if errors is None:
            errors = [p - c for p, c in zip(inputs, sent, strict=True)]
        sums = over_all_slices(moments.moments(inputs, sent, errors), split)
        rows = coll.to_varying(jnp.concatenate([sums, costs.facts], 1), axis)
        if not checked:
            return rows, ()
        lost = [p - c - r for p, c, r in zip(inputs, sent, errors, strict=True)]
        loss = over_all_slices(moments.squared_norms(lost), split)
        return rows, coll.to_varying(loss, axis)

    if always:
        return before._replace(**dict(zip(("moments", "loss"), record(), strict=True)))
    rows, loss = coll.agreed_cond(
        before.due, record, lambda: (before.moments, before.loss), axis=axis
    )
    return before._replace(moments=rows, loss=loss)


def after(
    monitor: MonitorState,
    recorded: tuple[Look, Costs],
    leaves: Sequence[Array],
    results: Mapping[str, list[Array]],
    axis: coll.AxisName,
    *,
    weight: Array | None,
    normalize: str,
) -> MonitorState:
    """The record after an exchange.

    Args:
      monitor: the record before it.
      recorded: what the exchange recorded of itself, and what it cost.
      leaves: its input.
      results: its results by name, a list for each.
      axis: the worker axis.
      weight: this worker's weight, or None.
      normalize: what the weighted sum is divided by, as in :class:`Exchange`.
    """
    now, costs = recorded
    treedef = jax.tree.structure(monitor.size)
    age, dense = monitor.age, monitor.dense
    if asked(age):
        pairs = zip(treedef.flatten_up_to(age), results["support"], strict=True)
        older = [jnp.where(new, 0, old + 1) for old, new in pairs]
        age = treedef.unflatten([coll.to_varying(x, axis) for x in older])
    if asked(dense):

        def compared() -> Array:
            means = _means(leaves, axis, weight, normalize)
            pairs = zip(results["aggregate"], means, strict=True)
            return _rows([_compared(*pair) for pair in pairs], len(DENSE))

        before = lambda: monitor.dense  # noqa: E731
        dense = (
            compared()
            if not asked(now.due)
            else coll.agreed_cond(now.due, compared, before, axis=axis)
        )
    return monitor._replace(
        moments=now.moments,
        traffic=counted(monitor.traffic, costs.bits),
        age=age,
        dense=dense,
        loss=now.loss,
    )


def with_gradient(monitor: MonitorState, gradient: Any, step: Array) -> MonitorState:
    """The record with the norms of the rule's gradient, if that is a tree like the input.

    Args:
      monitor: the record after the exchange.
      gradient: what the rule received.
      step: exchanges made so far, this one included.
    """
    if jax.tree.structure(gradient) != jax.tree.structure(monitor.size):
        return monitor

    def norms() -> Array:
        now = moments.squared_norms(jax.tree.leaves(gradient), local=_local())
        return jnp.stack([now, jnp.maximum(now, monitor.gradient[:, 1])], 1)

    due = look(monitor, step - 1).due
    rows = norms() if not asked(due) else jax.lax.cond(due, norms, lambda: monitor.gradient)
    return monitor._replace(gradient=rows)


def counted(traffic: Array, bits: Array) -> Array:
    """``MonitorState.traffic`` after one more exchange."""
    low = traffic[:, ::2] + bits[:, ::2]
    carry = (low < bits[:, ::2]).astype(jnp.uint32)
    high = traffic[:, 1::2] + bits[:, 1::2] + carry
    return jnp.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)


_WORD = 0xFFFFFFFF


def _local() -> bool:
    """Whether each leaf lies on a single device, so that it may be flattened and stacked."""
    lift = context.current()
    return lift is None or not lift.axis_sizes


def _rows(rows: list[Array], length: int) -> Array:
    return jnp.stack(rows) if rows else jnp.zeros((0, length), jnp.float32)


def _written(
    due: Array, result: Callable[[str], list[Array]], like: Sequence[Array]
) -> list[Array]:
    """What is sent, as arrays in memory: a condition is what a compiler does not look through.

    Else it would decode the message anew for every sum, value by value and not in order.
    """
    zeros = lambda: [jnp.zeros_like(x) for x in like]  # noqa: E731
    return jax.lax.cond(due, lambda: result("sent"), zeros)


def over_all_slices(sums: Array, split: Sequence[tuple[str, ...]]) -> Array:
    """Sums of slices, a row for each leaf, as sums of whole leaves."""
    for axes in dict.fromkeys(axes for axes in split if axes):
        own = np.asarray([one == axes for one in split]).reshape(-1, *(1,) * (sums.ndim - 1))
        sums = jnp.where(own, coll.psum(sums, axes), sums)
    return sums


def _means(
    leaves: Sequence[Array], axis: coll.AxisName, weight: Array | None, normalize: str
) -> list[Array]:
    """What the aggregate would be without compression; a dense sum over the workers."""
    one = jnp.ones((), jnp.float32) if weight is None else weight
    parts = [coll.psum(x * one.astype(x.dtype), axis) for x in leaves]
    present = normalize == "present"
    total = coll.psum(one, axis) if present else jnp.asarray(coll.axis_size(axis), jnp.float32)
    return [x / total.astype(x.dtype) for x in parts]


def _compared(aggregate: Array, mean: Array) -> Array:
    """A row of ``DENSE``."""
    aggregate = aggregate.astype(mean.dtype)
    product = jnp.sum(aggregate * mean).astype(jnp.float32)
    vectors = (aggregate, mean, aggregate - mean)
    return jnp.stack([product, *map(moments.squared_norm, vectors)])
