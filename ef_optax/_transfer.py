"""One round of requests in as few transfers as possible.

Everything that is gathered travels as the words of one ``uint32`` buffer, because a backend may
widen a collective of narrow numbers (XLA's CPU backend sends bf16 as float32) and because one
transfer is much cheaper than one for each leaf. Only sums and maxima travel as numbers, in one
buffer for each dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax import _collectives as coll
from ef_optax._base import Array

Tree = Any


def gather_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """All workers' trees through one all-gather; every array gains a leading worker axis."""
    if axis is None:
        return jax.tree.map(lambda x: x[None], list(trees))
    return _through_words(trees, lambda buffer: coll.all_gather(buffer, axis), leading=0)


def exchange_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Sends row j of every array to worker j through one all-to-all; same shapes come back."""
    if axis is None:
        return list(trees)
    return _through_words(trees, lambda buffer: coll.all_to_all(buffer, axis), leading=1)


def sum_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Sums over the workers. XLA merges the all-reduces of a round into one, without copies."""
    return _reduced(trees, axis, coll.psum)


def max_trees(trees: Sequence[Tree], axis: coll.AxisName) -> list[Tree]:
    """Elementwise maxima over the workers, merged like the sums."""
    return _reduced(trees, axis, coll.pmax)


def _reduced(trees: Sequence[Tree], axis: coll.AxisName, collective: Any) -> list[Tree]:
    """Each array reduced on its own; an empty one is the same everywhere and need not travel."""

    def one(x: Array) -> Array:
        return collective(x, axis) if x.size else jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(one, list(trees))


def word_count(shape: Sequence[int], dtype: Any) -> int:
    """Words that an array occupies on the wire: its bytes, padded to a multiple of four.

    >>> word_count((5,), jnp.bfloat16)
    3
    """
    return math.ceil(math.prod(shape) * jnp.dtype(dtype).itemsize / 4)


def to_words(x: Array) -> Array:
    """The bytes of a 1-D array as ``uint32`` words, padded with zeros to a whole word."""
    itemsize = x.dtype.itemsize
    if jnp.issubdtype(x.dtype, jnp.bool_) or itemsize not in (1, 2, 4, 8):
        raise TypeError(
            f"a message holds an array of dtype {x.dtype}; send whole bytes (pack bits into words)."
        )
    if itemsize >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    per_word = 4 // itemsize
    padded = jnp.pad(x, (0, -x.size % per_word)).reshape(-1, per_word)
    return jax.lax.bitcast_convert_type(padded, jnp.uint32)


def from_words(words: Array, shape: Sequence[int], dtype: Any) -> Array:
    """The inverse of :func:`to_words`, for one array of the given shape and dtype."""
    dtype, size = jnp.dtype(dtype), math.prod(shape)
    if dtype.itemsize == 8:
        words = words.reshape(-1, 2)
    return jax.lax.bitcast_convert_type(words, dtype).reshape(-1)[:size].reshape(shape)


def _through_words(
    trees: Sequence[Tree], transfer: Callable[[Array], Array], leading: int
) -> list[Tree]:
    """Flattens all arrays into one buffer of words, transfers it, and takes it apart again.

    With ``leading=0`` the arrays are whole messages and the transfer adds a worker axis; with
    ``leading=1`` they already have one, which the transfer keeps.
    """
    leaves, treedef = jax.tree.flatten(list(trees))
    if not leaves:
        return list(trees)
    pack = to_words if leading == 0 else jax.vmap(to_words)
    shapes = [x.shape[leading:] for x in leaves]
    flat = [pack(x.reshape(*x.shape[:leading], -1)) for x in leaves]
    buffer = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=leading)
    received = transfer(buffer)
    out, start = [], 0
    for x, shape in zip(leaves, shapes, strict=True):
        stop = start + word_count(shape, x.dtype)
        part = received[:, start:stop]
        out.append(jax.vmap(lambda w, s=shape, d=x.dtype: from_words(w, s, d))(part))
        start = stop
    return jax.tree.unflatten(treedef, out)
