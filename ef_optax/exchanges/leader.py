"""CLT-k of ScaleCom: in every step one worker's top-k indices serve all workers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.outcome import Protocol
from ef_optax._core.requests import Sum
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, bits_for, like_of, size_of
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse.top_k import TopK


@dataclasses.dataclass(frozen=True)
class LeaderTopK(TopK):
    """The k largest magnitudes of the leader's leaf choose what everybody sends."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, independent=False, basis="none")

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Two rounds: the leader's indices to all, then the values to the mean."""
        del num_workers
        size = size_of(shape)
        return self.count(size) * bits_for(size), self.count(size) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> None:
        """None: a worker may hold nothing at the leader's indices."""
        del shape, num_workers

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        leads = workers.step % workers.size == workers.index
        own = self.encode(x)["indices"]
        # Only the leader's words are not zero, so the sum is the leader's message.
        packed = yield Sum(jax.tree.map(lambda words: jnp.where(leads, words, 0), own))
        indices, _ = self.parts({"indices": packed, "values": None}, like_of(x))
        message = {"indices": packed, "values": x.reshape(-1)[indices]}
        return (yield from self.averaged(x, message, state))


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
      >>> tx = ef.compressed_mean(ef.exchanges.leader_top_k(k=1), axis_name="w")
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
