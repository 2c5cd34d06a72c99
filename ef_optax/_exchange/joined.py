"""Leaves of any shapes as one vector, for codecs that compress each block by itself.

A codec with a norm for each 128 values, say, does the same to a vector of many leaves as to each
leaf alone, if their sizes are multiples of 128. So the encoder and the decoder of a whole model are
compiled once, however many leaves and shapes it has. The vector is a copy of the leaves, which only
codecs that take several times as long as a copy can afford. It needs memory too; hence the limit.
Small leaves that end within a block are joined with zeros between them, if the codec ignores zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ef_optax._bits.packing import WORD_BITS
from ef_optax._core.codec import Codec
from ef_optax._core.joinable import JointCodec
from ef_optax._core.once import traced_once
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered
from ef_optax._core.traits import Traits
from ef_optax._core.transport import mean_of
from ef_optax._core.workers import Workers
from ef_optax._exchange.padded import Cut, Cutting, padded_to
from ef_optax._exchange.stack import STACK_LIMIT
from ef_optax._numeric import check, offsets
from ef_optax._numeric.buffers import in_buffers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import PartKeys
from ef_optax._numeric.shapes import like_of

JOINED_LIMIT = 1 << 25
"""The most values in one vector: 128 MiB of float32. Beyond it the largest leaves stay apart."""

SHORTEST_ROW = 128
"""Leaves are joined if they consist of rows of whole blocks that are not shorter than this."""


def row_of(codec: Codec) -> int | None:
    """The length of the rows of which a leaf must consist to be joined; None if none is joined."""
    block = codec.separable_into
    check.count(codec.name, "separable_into", block, optional=True)
    if block is None or not (codec.self_contained and codec.transport.stacks):
        return None
    return math.ceil(SHORTEST_ROW / block) * block


def of_whole_rows(codec: Codec, x: Any) -> bool:
    """Whether a leaf like ``x`` may be part of a vector."""
    row = row_of(codec)
    return row is not None and x.size > 0 and x.size % row == 0


def with_zeros(codec: Codec, x: Any) -> bool:
    """Whether a small leaf like ``x`` may be part of a vector with zeros between the leaves."""
    row = row_of(codec)
    if row is None or not codec.ignores_zeros or not 0 < x.size <= STACK_LIMIT:
        return False
    (padded,) = padded_to([x.size], _aligned(row))
    return padded <= 2 * max(x.size, SHORTEST_ROW)  # no more zeros than values


def _aligned(row: int) -> int:
    """The length to which leaves are padded: of whole rows, and of whole words of any codes."""
    return math.lcm(row, WORD_BITS)


def that_fit(sizes: Sequence[int]) -> list[int]:
    """The positions of the leaves that are joined, in ascending order; the smallest fit first.

    >>> that_fit([5, 1 << 25, 7])
    [0, 2]
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    ends = itertools.accumulate(sizes[i] for i in order)
    return sorted(i for i, end in zip(order, ends, strict=True) if end <= JOINED_LIMIT)


@dataclasses.dataclass(frozen=True)
class Joined(JointCodec):
    """``inner`` on each of a list of leaves, through one vector."""

    inner: Codec

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, streams=self.inner.streams)

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        sizes, cut = self._padded(x)
        key = self._keys(sizes, workers)
        return (yield from together(self.inner, x, state, workers, sizes, cut, key))

    def _padded(self, x: Sequence[Array]) -> tuple[Sequence[int], Cut | None]:
        """The sizes with zeros, and where the messages are; None if no leaf needs zeros."""
        if all(of_whole_rows(self.inner, leaf) for leaf in x):
            return [leaf.size for leaf in x], None
        row = _aligned(typing.cast(int, row_of(self.inner)))
        sizes = tuple(leaf.size for leaf in x)
        return padded_to(sizes, row), Cut(self.inner, x[0].dtype, sizes, row)

    def _keys(self, sizes: Sequence[int], workers: Workers) -> PartKeys | None:
        """A key for each leaf, so that each draws what it draws alone."""
        if self.inner.deterministic:
            return None

        def one(path: Array) -> Array:
            key = self.inner.step_key(dataclasses.replace(workers, path=path))
            return typing.cast(Array, key)

        row = typing.cast(int, row_of(self.inner))
        return PartKeys(jax.vmap(one)(workers.path), tuple(sizes), row)


def together(
    codec: Codec,
    x: list[Array],
    state: Any,
    workers: Workers,
    sizes: Sequence[int],
    cut: Cutting | None = None,
    key: Any = None,
) -> Protocol:
    """The protocol of leaves as one vector.

    Args:
      codec: which encodes the vector.
      x: the leaves.
      state: of the leaves, which stays.
      workers: where the protocol runs.
      sizes: of the leaves, with the zeros that follow them.
      cut: what is sent of the message; None for all of it, if there are no zeros.
      key: of a codec that is random.
    """
    step = workers.step
    where = offsets.as_data(offsets.begins(sizes), step)
    vector = as_vector(x, where, sizes)
    message = traced_once(codec.encode, vector, key)
    finite = traced_once(codec.finite, vector, message)
    got: Gathered = yield Gather(cut.cut(message) if cut else message, finite)
    if cut:
        got = dataclasses.replace(got, messages=jax.vmap(cut.whole)(got.messages))

    def leaves(vector: Array) -> list[Array]:
        return offsets.pieces(vector, x, where)

    def sent() -> list[Array]:
        decoded = in_buffers(lambda: traced_once(codec.decode, message, like_of(vector)), step)
        return leaves(decoded)

    def residual(x: list[Array] | None = None) -> list[Array]:
        if x is None:
            return leaves(traced_once(codec.residual, vector, message))
        # What is sent, in memory once more, costs less to compile than a decoder for each leaf.
        return [own - decoded for own, decoded in zip(x, sent(), strict=True)]

    return Outcome(
        aggregate=leaves(mean_of(codec, got, like_of(vector), workers)),
        state=state,
        sent=sent,
        residual=residual,
        support=lambda: leaves(traced_once(codec.support, vector, message)),
    )


def as_vector(leaves: Sequence[Array], where: Sequence[Array | int], sizes: Sequence[int]) -> Array:
    """The leaves, which have one dtype, as one vector, with zeros up to these sizes.

    Each is written to its place in a vector of zeros: what computes the leaf does so as it writes,
    whereas the operands of a concatenation are stored first, and then copied.
    """
    zero = lax.convert_element_type(where[0] * 0, leaves[0].dtype)
    vector = jnp.broadcast_to(zero, (sum(sizes),))
    for x, start in zip(leaves, where, strict=True):
        vector = offsets.written(vector, start, x.reshape(-1))
    return vector
