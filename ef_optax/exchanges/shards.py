"""The two halves of an exchange by shards, of which every worker owns one.

reduce_scatter:   all_to_all of C(row j) of all workers; worker j averages its row
gather_shards:    all_gather of C(shard j); all workers decode all shards
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import AllToAll, Gather, Gathered, Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.transport import Transport, mean_of
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax._numeric.shards import is_real, joined, shard_size, shards_of


@dataclasses.dataclass(frozen=True)
class ReduceScatter(Transport):
    """Worker j receives row j of every worker's leaf, compressed, and averages what it receives.

    The aggregate is not the leaf but this worker's shard of the mean, as (shard,), which is zero
    where the last shard is padded. Each row is compressed by itself, with its own scale or k.
    """

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        n = workers.size
        row = jax.ShapeDtypeStruct((shard_size(x.shape, n),), x.dtype)
        rows = shards_of(x, n)
        message = _encode_rows(codec, rows, workers)
        received: Gathered = yield AllToAll(message)
        mean = mean_of(codec, received, row, workers)
        return Outcome(
            aggregate=jnp.where(is_real(x.shape, workers.index, n), mean, 0),
            state=state,
            sent=lambda: joined(jax.vmap(lambda m: codec.decode(m, row))(message), x.shape),
            residual=lambda: joined(jax.vmap(codec.residual)(rows, message), x.shape),
            support=lambda: joined(jax.vmap(codec.support)(rows, message), x.shape),
        )

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits of a message for each row."""
        return (num_workers * codec.bits((shard_size(shape, num_workers),), dtype),)

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return Traits(
            homogeneous=own.homogeneous,
            deterministic=own.deterministic,
            additive=False,
            broadcast=False,
            basis=common(own).basis,
        )

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> float | None:
        """The least alpha of the rows."""
        return codec.alpha((shard_size(shape, num_workers),), num_workers)

    def noise_error(self, codec: Codec, shape: Shape, num_workers: int) -> float:
        """That of a row; 0 if a row may be padding."""
        row = shard_size(shape, num_workers)
        padded = size_of(shape) != num_workers * row
        return 0.0 if padded else codec.noise_error((row,), num_workers)


@dataclasses.dataclass(frozen=True)
class GatherShards(Transport):
    """All workers receive the shards of all workers, compressed.

    A worker's input is its own shard, as (shard,). The aggregate has all of them one after the
    other, as (n shard,), and what was sent and what is left are those of the worker's own.
    """

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        message, like = codec.encode(x, codec.step_key(workers)), like_of(x)
        gathered: Gathered = yield Gather(message)
        return Outcome(
            aggregate=jax.vmap(lambda m: codec.decode(m, like))(gathered.messages).reshape(-1),
            state=state,
            sent=lambda: codec.decode(message, like),
            residual=lambda: codec.residual(x, message),
            support=lambda: codec.support(x, message),
        )

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return dataclasses.replace(own, unbiased=False, linear=False, additive=False, streams=False)


def _encode_rows(codec: Codec, rows: Array, workers: Workers) -> Message:
    """The messages of the rows, each with its own key."""
    key = codec.step_key(workers)
    if key is None:
        return jax.vmap(codec.encode)(rows)

    def one(j: Array, row: Array) -> Message:
        return codec.encode(row, jax.tree.map(lambda k: jax.random.fold_in(k, j), key))

    return jax.vmap(one)(jnp.arange(len(rows)), rows)
