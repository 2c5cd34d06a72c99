"""Two shots: every worker is the server of one shard, and both directions are compressed.

all_to_all:   worker j receives C(row j) of all workers, and averages its row
all_gather:   worker j sends C_server(mean row + E_j) to all workers, and keeps the new E_j
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Protocol
from ef_optax._core.traits import Traits, common
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.shapes import Shape
from ef_optax._numeric.shards import is_real, joined, shard_size
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor
from ef_optax.exchanges.carried import carried
from ef_optax.exchanges.shards import GatherShards, ReduceScatter


class TwoShotState(NamedTuple):
    """State of :class:`TwoShot` for one leaf."""

    residual: Array  # per worker, (chunk,): E_j of the shard that this worker serves, 0 on padding

    roles = {"residual": "shards"}


@dataclasses.dataclass(frozen=True)
class TwoShot(Transport):
    """A codec for the rows, and ``server`` (None: the same codec) for the averaged shard."""

    server: Codec | None = None

    def run(self, codec: Codec, x: Array, state: TwoShotState, workers: Workers) -> Protocol:
        n, server = workers.size, self._server(codec)
        _check_shards(state, x.shape, n)
        up = yield from ReduceScatter().run(codec, x, (), workers)
        real = is_real(x.shape, workers.index, n)
        shard = jnp.where(real, up.aggregate + state.residual.astype(x.dtype), 0)
        down = yield from GatherShards().run(server, shard, (), workers)
        after = jnp.where(real, down.residual(), 0)
        return dataclasses.replace(
            up,
            aggregate=joined(down.aggregate, x.shape),
            state=TwoShotState(after.astype(state.residual.dtype)),
        )

    def init(self, codec: Codec, like: Any, num_workers: int) -> TwoShotState:
        return TwoShotState(jnp.zeros(shard_size(like.shape, num_workers), wide_dtype(like.dtype)))

    def _server(self, codec: Codec) -> Codec:
        return codec if self.server is None else self.server

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits of a worker's rows, then of the shard it serves."""
        shard = self._server(codec).bits((shard_size(shape, num_workers),), dtype)
        return *ReduceScatter().traffic(codec, shape, dtype, num_workers), shard

    def traits(self, codec: Codec) -> Traits:
        both = common(codec.traits, self._server(codec).traits)
        return dataclasses.replace(
            ReduceScatter().traits(codec),
            homogeneous=both.homogeneous,
            deterministic=both.deterministic,
            stateful=True,
        )

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> float | None:
        """The alpha of the worker's part, which is the least alpha of its rows."""
        return ReduceScatter().alpha(codec, shape, num_workers)

    def noise_error(self, codec: Codec, shape: Shape, num_workers: int) -> float:
        """For the worker's part; 0 if a row may be padding."""
        return ReduceScatter().noise_error(codec, shape, num_workers)


def _check_shards(state: TwoShotState, shape: Shape, n: int) -> None:
    """Refuses a state that was made for another number of workers."""
    size = shard_size(shape, n)
    if state.residual.shape != (size,):
        raise ValueError(
            f"two_shot: the state of a leaf of shape {shape} is for shards of "
            f"{state.residual.shape[0]} values, but {n} workers have shards of {size}. "
            "Call init where update is called, inside the map over the workers, as "
            "ef_optax.data_parallel and ef_optax.simulate do; change_workers carries a state over "
            "to another number of them."
        )


def two_shot(compressor: Compressor, server: Compressor | None = None) -> Compressor:
    """Exchanges by shards: all_to_all, average, compress again with feedback, all_gather.

    Every worker is the server of one n-th of each leaf, which is padded with zeros to equal shards.
    So the traffic of a device does not grow with the number of workers, as it does if all messages
    are gathered. The server's residual is on the shard's owner, in this compressor's state. Each
    shard is compressed by itself, with its own scale or k.

    ``error_feedback(two_shot(C, C_server), axis_name=a)`` is DoubleSqueeze with a sharded server.

    Args:
      compressor: what the workers send to the owners of the shards; stateless, for single leaves.
      server: what the owners send to all workers, by default the same compressor; the identity
        makes the second shot exact.

    Returns:
      The compressor. It is not additive: the aggregate is what the servers sent, but a worker's
      residual depends on what this worker sent.

    Raises:
      TypeError: if an argument is not a stateless Compressor of single leaves whose message one
        worker encodes alone.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> shot = ef.exchanges.two_shot(ef.scaled_sign(), ef.identity())
      >>> tx = ef.simulate(ef.compressed_mean(shot, axis_name="w"), 2, "w")
      >>> grads = jnp.array([[1.0, -3.0, 5.0, 5.0], [3.0, 1.0, 2.0, 4.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(4)), jnp.zeros(4))[0].tolist()
      [2.0, 0.0, 4.0, 4.0]

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Tang et al., "DoubleSqueeze", 2019;
      the exchange of Tang et al., "1-bit Adam", 2021.
    """
    codec = None if server is None else single_codec(server, "two_shot", "server")
    return carried("two_shot", compressor, TwoShot(codec))
