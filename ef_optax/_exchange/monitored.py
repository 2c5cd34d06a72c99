"""What a monitored exchange records of every leaf, as part of its own state.

The record travels in the state, so it passes through conditions and loops as the state does, costs
no transfer until it is read, and is the same program in a simulation and on a mesh. Without a
monitor the state has no record, and the program is that of an exchange that knows nothing of
monitors. Every worker records its own numbers; only ``dense_mean`` needs a collective.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._exchange import collectives as coll
from ef_optax._exchange.traffic import Bits
from ef_optax._numeric import moments
from ef_optax._numeric.dtypes import Array

MOMENTS = (*moments.MOMENTS, "message_bits", "promised_alpha")
"""The entries of a row of ``MonitorState.moments``; no known promise is NaN."""

TRAFFIC = ("size", "message_low", "message_high", "link_low", "link_high")
"""The entries of a row of ``MonitorState.traffic``: the size of the leaf, and the bits of all steps
so far as integers of 64 bits in two words."""

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


class MonitorState(NamedTuple):
    """What a monitored exchange has recorded; trees like its input, with a row for each leaf."""

    moments: Any  # per worker, float32 (len(MOMENTS),): of the last step
    traffic: Any  # uint32 (len(TRAFFIC),): of all steps
    gradient: Any  # per worker, float32 (len(GRADIENT),)
    age: Any  # per worker, int32 like the input: exchanges since an entry was sent; () if not asked
    dense: Any  # float32 (len(DENSE),); () if not asked
    loss: Any  # per worker, float32 scalars: the sum of squares of input - sent - residual; or ()


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

    def rows(length: int, dtype: Any = jnp.float32) -> Any:
        return jax.tree.map(lambda _: jnp.zeros(length, dtype), tree)

    return MonitorState(
        moments=rows(len(MOMENTS)),
        traffic=rows(len(TRAFFIC), jnp.uint32),
        gradient=rows(len(GRADIENT)),
        age=jax.tree.map(lambda x: jnp.zeros_like(x, jnp.int32), tree) if wanted.age else (),
        dense=rows(len(DENSE)) if wanted.dense_mean else (),
        loss=jax.tree.map(lambda _: jnp.zeros(()), tree) if wanted.conservation else (),
    )


def applies(monitor: Any, treedef: Any) -> bool:
    """Whether a tree of this structure is recorded; rules also send trees of other kinds."""
    return bool(monitor) and jax.tree.structure(monitor.traffic) == treedef


def names(monitor: MonitorState, want: Sequence[str]) -> tuple[str, ...]:
    """The results of an exchange that the record needs besides those that are wanted anyway."""
    needed = []
    if monitor.loss != ():
        needed += ["sent", "residual"]
    elif not {"sent", "residual"} & set(want):
        needed += ["residual"]
    if monitor.age != ():
        needed += ["support"]
    return tuple(dict.fromkeys((*want, *needed)))


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


def after(
    monitor: MonitorState,
    leaves: Sequence[Array],
    results: Mapping[str, list[Array]],
    costs: Costs,
    axis: coll.AxisName,
    *,
    weight: Array | None,
    normalize: str,
    local: bool,
) -> MonitorState:
    """The record after an exchange.

    Args:
      monitor: the record before it.
      leaves: the input of the exchange.
      results: its results by name, a list for each.
      costs: what it cost.
      axis: the worker axis.
      weight: this worker's weight, or None.
      normalize: what the weighted sum is divided by, as in :class:`Exchange`.
      local: whether each leaf lies on a single device.
    """
    treedef = jax.tree.structure(monitor.traffic)
    mine = lambda x: coll.to_varying(x, axis)  # noqa: E731
    residuals = results.get("residual")
    sent = results.get("sent") or [p - r for p, r in zip(leaves, residuals or (), strict=True)]
    errors = residuals or [p - c for p, c in zip(leaves, sent, strict=True)]
    sums = moments.moments(leaves, sent, errors, local=local)
    rows = [mine(jnp.concatenate([*pair])) for pair in zip(sums, costs.facts, strict=True)]
    traffic = [
        counted(row, x.size, bits)
        for row, x, bits in zip(
            treedef.flatten_up_to(monitor.traffic), leaves, costs.bits, strict=True
        )
    ]
    age, dense, loss = monitor.age, monitor.dense, monitor.loss
    if age != ():
        pairs = zip(treedef.flatten_up_to(age), results["support"], strict=True)
        age = treedef.unflatten([mine(jnp.where(new, 0, old + 1)) for old, new in pairs])
    if dense != ():
        means = _means(leaves, axis, weight, normalize)
        pairs = zip(results["aggregate"], means, strict=True)
        dense = treedef.unflatten([_compared(*pair) for pair in pairs])
    if loss != ():
        triples = zip(leaves, sent, errors, strict=True)
        lost = [moments.squared_norm(p - c - r) for p, c, r in triples]
        loss = treedef.unflatten([mine(x) for x in lost])
    return monitor._replace(
        moments=treedef.unflatten(rows),
        traffic=treedef.unflatten(traffic),
        age=age,
        dense=dense,
        loss=loss,
    )


def with_gradient(monitor: MonitorState, gradient: Any) -> MonitorState:
    """The record with the norms of the rule's gradient, if that is a tree like the input."""
    treedef = jax.tree.structure(monitor.traffic)
    if jax.tree.structure(gradient) != treedef:
        return monitor
    rows = [
        jnp.stack([now, jnp.maximum(now, row[1])])
        for now, row in zip(
            map(moments.squared_norm, jax.tree.leaves(gradient)),
            treedef.flatten_up_to(monitor.gradient),
            strict=True,
        )
    ]
    return monitor._replace(gradient=treedef.unflatten(rows))


_WORD = 0xFFFFFFFF


def counted(row: Array, size: int, bits: Array) -> Array:
    """A row of ``TRAFFIC`` after one more exchange."""
    words = [jnp.asarray(size, jnp.uint32)]
    for low, high in ((0, 1), (2, 3)):
        total = row[1 + low] + bits[low]
        carry = (total < bits[low]).astype(jnp.uint32)
        words += [total, row[1 + high] + bits[high] + carry]
    return jnp.stack(words)


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
