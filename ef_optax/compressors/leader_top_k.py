"""CLT-k of ScaleCom: in every step one worker's top-k indices serve all workers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _fields, _packing
from ef_optax._base import (
    Array,
    Mean,
    Message,
    Outcome,
    Protocol,
    Shape,
    Sum,
    Workers,
    bits_of,
    size_of,
)
from ef_optax._compressor import Compressor
from ef_optax._selection import top_k_indices
from ef_optax.compressors.sparsify import SparseCodec, check_ratio_or_k, resolve_k


@dataclasses.dataclass(frozen=True)
class LeaderTopK(SparseCodec):
    """The k largest magnitudes of the leader's leaf choose what everybody sends."""

    ratio: float | None = None
    k: int | None = None

    independent: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = ("reduce",)

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return resolve_k(self.ratio, self.k, size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        """The leader's own message: its indices and its values there."""
        del key
        flat = x.reshape(-1)
        indices = top_k_indices(flat, self.count(flat.size))
        return {
            "indices": _fields.pack(indices, _packing.bits_for(flat.size)),
            "values": flat[indices],
        }

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        indices = _fields.unpack(message["indices"], _packing.bits_for(size), self.count(size))
        return indices, message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return self.count(size) * (bits_of(dtype) + _packing.bits_for(size))

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Two rounds: the leader's indices to all, then the values to the mean."""
        del num_workers
        size = size_of(shape)
        return self.count(size) * _packing.bits_for(size), self.count(size) * bits_of(dtype)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        leads = workers.step % workers.size == workers.index
        own = self.encode(x)["indices"]
        # Only the leader's words are not zero, so the sum is the leader's message.
        packed = yield Sum(jax.tree.map(lambda words: jnp.where(leads, words, 0), own))
        indices, _ = self.parts({"indices": packed, "values": None}, like)
        message = {"indices": packed, "values": x.reshape(-1)[indices]}
        mean = yield Mean(message["values"])
        return Outcome(
            aggregate=self.decode({**message, "values": mean}, like),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )


def leader_top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """CLT-k: worker ``t mod n`` chooses the k indices of its largest magnitudes for all workers.

    Because everybody sends the same coordinates, the messages can be summed on the way: the traffic
    of a device does not grow with the number of workers. alpha is not known in general: a worker
    may hold nothing at the leader's indices. Under error feedback the workers' residuals come to
    resemble one another, which is what makes it work.

    Args:
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either this or ``ratio``.

    Returns:
      The compressor; two rounds, k packed indices and then k values.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.leader_top_k(k=1), axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> grads = jnp.array([[3.0, 1.0], [0.0, 5.0]])  # worker 0 leads first
      >>> tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist()
      [1.5, 0.0]

    References:
      Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient
      Distributed Training", NeurIPS 2020.
    """
    check_ratio_or_k("leader_top_k", ratio, k)
    return Compressor(LeaderTopK(ratio, k))
