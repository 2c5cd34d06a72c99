"""A sparse codec that handles small leaves of different shapes as the rows of one array.

A row is a flattened leaf and then zeros, up to the length of the largest. The leaves of a family
need equally many bits for an index, so no row is more than twice as long as its leaf. The programs
that choose, pack, unpack and scatter are compiled once for the family, not once for each shape.
What is sent of each leaf is the same as without its neighbours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits import fields
from ef_optax._core.joinable import JointCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered
from ef_optax._core.workers import Workers
from ef_optax._numeric import offsets
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import bits_for, like_of
from ef_optax._select.leaf import top_k_of_rows
from ef_optax.compressors.sparse import _sparse


@dataclasses.dataclass(frozen=True)
class SparseRows(JointCodec):
    """The largest magnitudes of each of a list of small leaves; ``inner`` counts them."""

    inner: _sparse.IndexedCodec

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        numbers = offsets.as_data(range(len(x)), workers.step)
        counts = [self.inner.count(leaf.size) for leaf in x]
        array = _as_rows(x)
        length, total = array.shape[1], sum(counts)
        begins = np.repeat(np.arange(len(x), dtype=np.uint32) * np.uint32(length), counts)
        indices = top_k_of_rows(array, counts)
        positions = indices + begins
        values = array.reshape(-1).at[positions].get(mode="promise_in_bounds")
        message = {"indices": fields.pack(indices, bits_for(length)), "values": values}
        gathered: Gathered = yield Gather(message, self.inner.finite(array, message))

        def leaves(rows: Array) -> list[Array]:
            return [
                lax.dynamic_slice(rows, (i, jnp.zeros_like(i)), (1, y.size)).reshape(y.shape)
                for i, y in zip(numbers, x, strict=True)
            ]

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


def _as_rows(leaves: list[Array]) -> Array:
    """The leaves as rows, filled up with zeros.

    >>> _as_rows([jnp.ones((2, 2)), jnp.ones(3)]).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]
    """
    length = max(x.size for x in leaves)
    parts = []
    for x in leaves:
        parts.append(x.reshape(-1))
        if x.size < length:
            parts.append(jnp.zeros(length - x.size, x.dtype))
    return lax.concatenate(parts, 0).reshape(-1, length)
