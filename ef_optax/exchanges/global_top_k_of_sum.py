"""The largest of the sum: all workers apply the k largest entries of the mean message.

all_gather:   C(x_i) of every worker, k values each, to all workers
then          the k largest magnitudes of sum_i C(x_i)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered
from ef_optax._core.traits import Traits
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, like_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import SparseCodec
from ef_optax.compressors.sparse.top_k import TopK
from ef_optax.exchanges.carried import SPARSE, Carried, carried
from ef_optax.exchanges.tree import Tree


@dataclasses.dataclass(frozen=True)
class LargestOfSum(Transport):
    """The k largest entries of the sum of the workers' messages are applied; the rest is kept."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (SPARSE,)

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        assert isinstance(codec, SparseCodec)
        message, like = codec.encode(x, codec.step_key(workers)), like_of(x)
        got: Gathered = yield Gather(message)
        mean = codec.decode_mean(got.messages, like, got.weights, got.total).reshape(-1)
        chosen = top_k_indices(mean, codec.count(mean.size))
        applied = jnp.zeros(mean.size, bool).at[chosen].set(True).reshape(x.shape)

        def sent() -> Array:
            return jnp.where(applied, codec.decode(message, like), jnp.zeros((), x.dtype))

        return Outcome(
            aggregate=jnp.where(applied, mean.reshape(x.shape), jnp.zeros((), x.dtype)),
            state=state,
            sent=sent,
            residual=lambda: x - sent(),
            support=lambda: applied & codec.support(x, message),
        )

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return dataclasses.replace(own, unbiased=False, linear=False, independent=False)

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> float | None:
        """The codec's alpha for one worker; None for several, as a worker may send nothing."""
        return codec.alpha(shape) if num_workers == 1 else None


def largest_of_sum(compressor: Compressor) -> Compressor:
    """Applies only the k largest values of the sum of all workers' sparse messages.

    A worker has *sent* those of its values whose coordinates are among the k that are applied;
    error feedback keeps the others. The aggregate is exactly the mean of what was sent (additive),
    and as sparse as one message. For one worker it is the compressor itself; for several workers no
    contraction constant is known.

    Args:
      compressor: a sparsifier; k is the number of values that its message can hold.

    Returns:
      The compressor. Bits: those of the message.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.
      ValueError: if it does not send indices and values.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> largest = ef.exchanges.largest_of_sum(ef.block_top_k(k=1, block=2))
      >>> tx = ef.simulate(ef.compressed_mean(largest, axis_name="w"), 2, "w")
      >>> grads = jnp.array([[9.0, 1.0, 2.0, 0.0], [0.0, 8.0, 3.0, 0.0]])
      >>> tx.update(grads, tx.init(jnp.zeros(4)), jnp.zeros(4))[0].tolist()
      [4.5, 4.0, 0.0, 0.0]

    References:
      Shi et al., A distributed synchronous SGD algorithm with global top-k sparsification for low
      bandwidth networks, 2019, section III.
    """
    return carried("largest_of_sum", compressor, LargestOfSum())


def global_top_k_of_sum(
    ratio: float | None = None, *, k: int | None = None, tree: bool = False
) -> Compressor:
    """gTop-k: applies only the k largest values of the sum of all workers' top-k messages.

    It is :func:`largest_of_sum` of :func:`ef_optax.top_k`: each worker sends its top-k, and all
    workers add the messages and keep the k largest magnitudes of the sum. With ``tree``, as
    published, it is :func:`tree` of ``top_k``: the messages are merged pairwise, so that k pairs
    cross every link whatever n is. A worker has sent those of its values that are applied. For one
    worker it is top-k (alpha = k/d); for several workers no constant is known.

    Args:
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.
      tree: whether to merge pairwise; the number of workers must then be a power of two.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)) per worker, by a gather; with the tree, the same
      in each of log2 n rounds, and once more for the result.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range; at the first
        exchange, for a tree if the number of workers is not a power of two.

    Example:
      Two workers send 3 and 2.5 for one coordinate, and a third sends 4.5 for another: 5.5 is the
      largest value of the sum.

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.global_top_k_of_sum(k=1), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=3, axis_name="data")
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[3.0, 0.0], [2.5, 0.0], [0.0, 4.5]])
      >>> (3 * tx.update(grads, tx.init(params), params)[0]).tolist()
      [5.5, 0.0]

    References:
      Shi et al., A distributed synchronous SGD algorithm with global top-k sparsification for low
      bandwidth networks, 2019, section III; the tree and the residuals are those of the authors'
      public implementation.
    """
    check_ratio_or_k("global_top_k_of_sum", ratio, k)
    check.flag("global_top_k_of_sum", "tree", tree)
    return Compressor(Carried(TopK(ratio, k), Tree() if tree else LargestOfSum()))
