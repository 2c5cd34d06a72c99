"""A leader chooses: in every step all workers use one worker's indices.

sum:          the indices of worker t mod n, to which the others add zeros
all_reduce:   the mean of all workers' values there
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Protocol
from ef_optax._core.requests import Sum
from ef_optax._core.traits import Traits
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import Followable
from ef_optax.compressors.sparse.top_k import TopK
from ef_optax.exchanges.carried import FOLLOWABLE, Carried, carried


@dataclasses.dataclass(frozen=True)
class Leader(Transport):
    """Worker t mod n chooses the positions, and all workers send their values there."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (FOLLOWABLE,)

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        assert isinstance(codec, Followable)
        leads = workers.step % workers.size == workers.index
        own = codec.positions(codec.encode(x, codec.step_key(workers)))
        # Only the leader's words are not zero, so the sum is the leader's message.
        positions = yield Sum(jax.tree.map(lambda words: jnp.where(leads, words, 0), own))
        return (yield from codec.averaged(x, codec.follow(x, positions), state))

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Two rounds: the leader's positions to all, then the mean of the values."""
        del num_workers
        assert isinstance(codec, Followable)
        values = codec.count(size_of(shape)) * bits_of(dtype)
        return codec.bits(shape, dtype) - values, values

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return dataclasses.replace(
            own, unbiased=False, linear=False, independent=False, basis="none"
        )

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> None:
        """None: a worker may have only zeros at the leader's positions."""
        del codec, shape, num_workers


def leader(compressor: Compressor) -> Compressor:
    """All workers send their values at the positions that worker ``t mod n`` chooses.

    Because all workers send the same coordinates, the values are summed on the way, and the traffic
    of a device does not grow with the number of workers. alpha is not known in general, since a
    worker may have only zeros at the leader's positions. It works under error feedback because the
    workers' residuals become similar.

    Args:
      compressor: a sparsifier whose values depend only on the leaf's values at their positions:
        ``top_k``, ``block_top_k``, ``threshold``, ``sampled_top_k``, ``redsync``, ``mix_k``,
        ``comp_k`` or ``random_k``.

    Returns:
      The compressor. It takes two rounds, for the positions and for the values.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.
      ValueError: if it is not such a sparsifier.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> chosen = ef.exchanges.leader(ef.block_top_k(k=1, block=2))
      >>> tx = ef.simulate(ef.compressed_mean(chosen, axis_name="w"), 2, "w")
      >>> grads = jnp.array([[3.0, 1.0, 0.0, 2.0], [0.0, 5.0, 4.0, 4.0]])  # worker 0 leads first
      >>> tx.update(grads, tx.init(jnp.zeros(4)), jnp.zeros(4))[0].tolist()
      [1.5, 0.0, 0.0, 3.0]

    References:
      Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient
      Distributed Training", NeurIPS 2020, for top-k.
    """
    return carried("leader", compressor, Leader())


def leader_top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """CLT-k: all workers send their values at worker ``t mod n``'s k largest magnitudes.

    It is :func:`leader` of :func:`ef_optax.top_k`.

    Args:
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.

    Returns:
      The compressor. It takes two rounds, for k packed indices and for k values.

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
      Chen et al., ScaleCom, NeurIPS 2020.
    """
    check_ratio_or_k("leader_top_k", ratio, k)
    return Compressor(Carried(TopK(ratio, k), Leader()))
