"""One round of requests in as few transfers as possible.

Everything that is gathered travels as the words of one ``uint32`` buffer, because a backend may
widen a collective of narrow numbers (XLA's CPU backend sends bf16 as float32), and because one
transfer is much cheaper than one per leaf. The bits of all leaves' fields are contiguous, so that
less than one word of a round is padding. Only sums and maxima travel as numbers, in one buffer per
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits.fields import from_rows, from_words, to_words
from ef_optax._exchange import collectives as coll
from ef_optax._numeric.dtypes import Array

Tree = Any


def gather_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """All workers' trees through one all-gather; every array gains a leading worker axis."""
    if axis is None:
        return jax.tree.map(lambda x: x[None], list(trees))
    return _through_words(trees, lambda buffer: coll.all_gather(buffer, axis), leading=0)


def exchange_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Sends row j of every array to worker j through one all-to-all; the shapes stay the same."""
    if axis is None:
        return list(trees)
    return _through_words(trees, lambda buffer: coll.all_to_all(buffer, axis), leading=1)


def permute_trees(
    trees: Sequence[Tree], pairs: Sequence[tuple[int, int]], axis: coll.AxisName
) -> list[Tree]:
    """Sends trees from source to target for each pair; the others receive zeros."""
    messages = list(trees)
    words = to_words(messages)
    received = coll.permute(words, pairs, axis) if words.size else words
    return from_words(received, messages)


def sum_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Sums over the workers. XLA merges the all-reduces of a round into one, without copies.

    Between processes on CPUs XLA's merged all-reduce is a ring of Gloo for each array, one after
    the other, and each waits for the latency of the network. There the arrays of a dtype are
    joined.
    """
    if coll.one_by_one(axis):
        return _joined_sums(trees, axis)
    return _reduced(trees, axis, coll.psum)


def max_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Elementwise maxima over the workers, merged like the sums."""
    return _reduced(trees, axis, coll.pmax)


def _reduced(trees: Sequence[Tree], axis: coll.AxisName, collective: Any) -> list[Tree]:
    """Reduces each array separately; empty ones are the same on all workers and do not travel."""
    arrays, structure = jax.tree.flatten(list(trees))
    full = [x for x in arrays if x.size]
    reduced = iter(collective(full, axis) if full else ())
    results = [next(reduced) if x.size else jnp.zeros(x.shape, x.dtype) for x in arrays]
    return jax.tree.unflatten(structure, results)


def _joined_sums(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """The same sums through one array for each dtype."""
    arrays, structure = jax.tree.flatten(list(trees))
    sums = [jnp.zeros(x.shape, x.dtype) for x in arrays]  # of empty arrays, which do not travel
    for dtype in dict.fromkeys(x.dtype for x in arrays if x.size):
        own = [i for i, x in enumerate(arrays) if x.size and x.dtype == dtype]
        ends = np.cumsum([arrays[i].size for i in own])
        joined = jnp.concatenate([arrays[i].reshape(-1) for i in own])
        parts = jnp.split(coll.psum(joined, axis), ends[:-1])
        for i, part in zip(own, parts, strict=True):
            sums[i] = part.reshape(arrays[i].shape)
    return jax.tree.unflatten(structure, sums)


def _through_words(
    trees: Sequence[Tree], transfer: Callable[[Array], Array], leading: int
) -> list[Tree]:
    """Puts all fields into one buffer of words, transfers it, and splits it again.

    With ``leading=0`` the transfer adds a worker axis to the trees; with ``leading=1`` they already
    have one, which the transfer keeps.
    """
    messages = list(trees)
    if not jax.tree.leaves(messages):
        return messages
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[leading:], x.dtype), messages)
    words = to_words(messages) if leading == 0 else jax.vmap(to_words)(messages)
    received = transfer(words)
    runtime = received[0, 0] if received.size else None
    return from_rows(received, like, runtime)
