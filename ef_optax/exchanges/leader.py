"""A leader chooses: in every step one worker's indices serve all workers.

sum:          the indices of worker t mod n, to which the others add zeros
all_reduce:   the mean of everybody's values there
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
    """Worker t mod n chooses the places, everybody sends its values there."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (FOLLOWABLE,)

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        assert isinstance(codec, Followable)
        leads = workers.step % workers.size == workers.index
        own = codec.places(codec.encode(x, codec.step_key(workers)))
        # Only the leader's words are not zero, so the sum is the leader's message.
        places = yield Sum(jax.tree.map(lambda words: jnp.where(leads, words, 0), own))
        return (yield from codec.averaged(x, codec.follow(x, places), state))

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Two rounds: the leader's places to all, then the values to the mean."""
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
        """None: a worker may hold nothing at the leader's places."""
        del codec, shape, num_workers


def leader(compressor: Compressor) -> Compressor:
    """Worker ``t mod n`` chooses the places of its message for all workers.

    Because everybody sends the same coordinates, the values are summed on the way: the traffic of
    a device does not grow with the number of workers. alpha is not known in general: a worker may
    hold nothing at the leader's places. Under error feedback the workers' residuals come to
    resemble one another, which is what makes it work.

    Args:
      compressor: a sparsifier whose values depend on the leaf at their places alone: ``top_k``,
        ``block_top_k``, ``threshold``, ``sampled_top_k``, ``redsync``, ``mix_k``, ``comp_k`` or
        ``random_k``.

    Returns:
      The compressor; two rounds, the places and then the values.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message is
        encoded by one worker alone.
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
    """CLT-k: worker ``t mod n`` chooses the k indices of its largest magnitudes for all workers.

    :func:`leader` of :func:`ef_optax.top_k`.

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
      Chen et al., ScaleCom, NeurIPS 2020.
    """
    check_ratio_or_k("leader_top_k", ratio, k)
    return Compressor(Carried(TopK(ratio, k), Leader()))
