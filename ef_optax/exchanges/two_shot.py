"""Two shots: every worker is the server of one shard; both directions are compressed.

all_to_all:   worker j receives C(row j) of everybody, and averages its row
all_gather:   worker j sends C_server(mean row + E_j) to everybody, keeps E_j
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import AllToAll, Gather, Gathered, Message
from ef_optax._core.traits import Traits, common
from ef_optax._core.workers import Workers
from ef_optax._exchange import collectives as coll
from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor


class TwoShotState(NamedTuple):
    """State of :class:`TwoShot` for one leaf."""

    residual: Array  # per worker, (chunk,): E_j of the shard that this worker serves, 0 on padding

    roles = {"residual": "shards"}


@dataclasses.dataclass(frozen=True)
class TwoShot(Codec):
    """A worker codec for the rows, a server codec for the averaged shard."""

    worker: Codec
    server: Codec
    axis_name: AxisName

    @property
    def traits(self) -> Traits:
        both = common(self.worker.traits, self.server.traits)
        return Traits(
            homogeneous=both.homogeneous,
            deterministic=both.deterministic,
            additive=False,
            broadcast=False,
            stateful=True,
            basis=common(self.worker.traits).basis,
        )

    def init(self, like: Any, path: str, num_workers: int) -> TwoShotState:
        del path, num_workers
        chunk = _chunk(like.shape, coll.axis_size(self.axis_name))
        return TwoShotState(jnp.zeros(chunk, wide_dtype(like.dtype)))

    def protocol(self, x: Array, state: TwoShotState, workers: Workers) -> Protocol:
        n = workers.size
        row = jax.ShapeDtypeStruct((_chunk(x.shape, n),), x.dtype)
        rows = jnp.pad(x.reshape(-1), (0, n * row.shape[0] - x.size)).reshape(n, -1)

        message = self._encode_rows(rows, workers)
        received: Gathered = yield AllToAll(message)
        real = jnp.arange(row.shape[0], dtype=jnp.int32) < x.size - workers.index * row.shape[0]
        mean = self.worker.decode_mean(received.messages, row, received.weights, received.total)
        shard = jnp.where(real, mean + state.residual.astype(x.dtype), 0)
        answer = self.server.encode(shard, self.server.step_key(workers))
        after = jnp.where(real, self.server.residual(shard, answer), 0)
        gathered: Gathered = yield Gather(answer)
        result = jax.vmap(lambda m: self.server.decode(m, row))(gathered.messages)

        def whole(parts: Array) -> Array:
            return parts.reshape(-1)[: x.size].reshape(x.shape)

        return Outcome(
            aggregate=whole(result),
            state=TwoShotState(after.astype(state.residual.dtype)),
            sent=lambda: whole(jax.vmap(lambda m: self.worker.decode(m, row))(message)),
            residual=lambda: whole(jax.vmap(self.worker.residual)(rows, message)),
            support=lambda: whole(jax.vmap(self.worker.support)(rows, message)),
        )

    def _encode_rows(self, rows: Array, workers: Workers) -> Message:
        key = self.worker.step_key(workers)
        if key is None:
            return jax.vmap(self.worker.encode)(rows)

        def one(j: Array, row: Array) -> Message:
            return self.worker.encode(row, jax.tree.map(lambda k: jax.random.fold_in(k, j), key))

        return jax.vmap(one)(jnp.arange(len(rows)), rows)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        """One worker's rows are only defined together with the others; this is the worker codec."""
        return self.worker.encode(x, key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self.worker.decode(message, like)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits of a worker's rows, then of the shard it serves."""
        chunk = _chunk(shape, num_workers)
        rows = num_workers * self.worker.bits((chunk,), dtype)
        return rows, self.server.bits((chunk,), dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Of the worker's part: the least of its rows."""
        return self.worker.alpha((_chunk(shape, num_workers),), num_workers)

    def least_error(self, shape: Shape, num_workers: int = 1) -> float:
        """Of the worker's part; 0 where a row may lie in the padding."""
        chunk = _chunk(shape, num_workers)
        padded = size_of(shape) != num_workers * chunk
        return 0.0 if padded else self.worker.least_error((chunk,), num_workers)


def _chunk(shape: Shape, n: int) -> int:
    """Length of each worker's shard; the last one is padded with zeros."""
    return -(-size_of(shape) // n)


def two_shot(
    compressor: Compressor, server: Compressor | None = None, *, axis_name: AxisName
) -> Compressor:
    """Exchanges by shards: all_to_all, average, compress again with feedback, all_gather.

    Every worker serves one n-th of each leaf (padded with zeros to equal shards), so the traffic of
    a device does not grow with the number of workers, as it does when all messages are gathered.
    The server's residual lives on the shard's owner, in this compressor's state. Compression is per
    shard: a scale, or k, for each.

    ``error_feedback(two_shot(C, C_server, axis_name=a), axis_name=a)`` is DoubleSqueeze with a
    sharded server.

    Args:
      compressor: what the workers send to the owners of the shards; stateless, for single leaves.
      server: what the owners send to everybody; default the same; the identity makes the second
        shot exact.
      axis_name: the worker axis, the same as that of the rule it is given to.

    Returns:
      The compressor. It is not additive: the aggregate is what the servers sent, while the worker's
      residual is about what the worker sent.

    Raises:
      TypeError: if an argument is not a stateless Compressor of single leaves.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> shot = ef.exchanges.two_shot(ef.scaled_sign(), ef.identity(), axis_name="w")
      >>> tx = ef.simulate(ef.compressed_mean(shot, axis_name="w"), 2, "w")
      >>> grads = jnp.array([[1.0, -3.0, 5.0, 5.0], [3.0, 1.0, 2.0, 4.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(4)), jnp.zeros(4))[0].tolist()
      [2.0, 0.0, 4.0, 4.0]

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Tang et al., "DoubleSqueeze", 2019;
      the exchange of Tang et al., "1-bit Adam", 2021.
    """
    check.axis(axis_name)
    worker = single_codec(compressor, "two_shot", "compressor")
    back = worker if server is None else single_codec(server, "two_shot", "server")
    return Compressor(TwoShot(worker, back, axis_name))
