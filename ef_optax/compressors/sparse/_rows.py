"""A sparse codec that handles small leaves of different shapes as the rows of one array.

A row is a flattened leaf, or a block of one, and then zeros, up to the length of the largest. The
leaves of a family need equally many bits for an index, so no leaf is followed by more zeros than it
has values. The programs that choose, pack, unpack and scatter are compiled once for the family, not
once for each shape. What is sent of each leaf is the same as without its neighbours.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits import fields
from ef_optax._core.joinable import Joinable, JointCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered
from ef_optax._core.workers import Workers
from ef_optax._numeric import offsets
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import bits_for, like_of
from ef_optax._select.leaf import top_k_of_rows
from ef_optax.compressors.sparse import _sparse


class RowCodec(Joinable):
    """A codec that sends the largest magnitudes of each row of a leaf, and their indices in it."""

    @abc.abstractmethod
    def rows(self, size: int) -> tuple[int, list[int]]:
        """The length of the rows of a leaf, of which the last may be shorter; how many each sends.

        Leaves with more than one row all have rows of one length, and no leaf has longer ones.
        """


@dataclasses.dataclass(frozen=True)
class SparseRows(JointCodec):
    """The largest magnitudes of each row of a list of small leaves; ``inner`` counts them."""

    inner: RowCodec

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        lengths, each = zip(*(self.inner.rows(leaf.size) for leaf in x), strict=True)
        length, counts = max(lengths), [count for own in each for count in own]
        padded = [length * len(own) for own in each]
        array = _as_rows(x, padded, length)
        total = sum(counts)
        where = offsets.as_data(offsets.begins(padded), workers.step)
        begins = np.repeat(np.arange(len(counts), dtype=np.uint32) * np.uint32(length), counts)
        indices = top_k_of_rows(array, counts)
        positions = indices + begins
        values = array.reshape(-1).at[positions].get(mode="promise_in_bounds")
        message = {"indices": fields.pack(indices, bits_for(length)), "values": values}
        gathered: Gathered = yield Gather(message, self.inner.finite(array, message))

        def leaves(rows: Array) -> list[Array]:
            return offsets.pieces(rows.reshape(-1), x, where)

        def received(field: fields.Packed) -> Array:
            return fields.unpack(field, bits_for(length), total) + begins

        places = jax.vmap(received)(gathered.messages["indices"]).reshape(-1)
        shares = _sparse.shares_of_mean(
            gathered.messages["values"], array.dtype, gathered.weights, gathered.total
        ).reshape(-1)
        return Outcome(
            aggregate=leaves(_sparse.scatter(shares, places, like_of(array))),
            state=state,
            sent=lambda: leaves(_sparse.scatter(values, positions, like_of(array))),
            residual=lambda: leaves(_sparse.subtract_at(array, positions, values)),
            support=lambda: leaves(_sparse.mask_at(array, positions, values)),
        )


def _as_rows(leaves: list[Array], padded: Sequence[int], length: int) -> Array:
    """The leaves as rows of this length, each filled up with zeros to its padded size.

    >>> _as_rows([jnp.ones((2, 2)), jnp.ones(3)], [4, 4], 4).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]
    """
    parts = []
    for x, size in zip(leaves, padded, strict=True):
        parts.append(x.reshape(-1))
        if x.size < size:
            parts.append(jnp.zeros(size - x.size, x.dtype))
    return lax.concatenate(parts, 0).reshape(-1, length)
