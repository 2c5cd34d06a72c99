"""Global top-k of the sum: every worker applies the k largest entries of the mean message."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, like_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse.top_k import TopK
from ef_optax.exchanges.tree import GlobalTopKTree


@dataclasses.dataclass(frozen=True)
class GlobalTopKOfSum(TopK):
    """Of the sum of the workers' top-k messages the k largest are applied; the rest is kept."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, independent=False)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        del workers
        message, like = self.encode(x), like_of(x)
        got: Gathered = yield Gather(message)
        mean = self.decode_mean(got.messages, like, got.weights, got.total).reshape(-1)
        chosen = top_k_indices(mean, self.count(mean.size))
        applied = jnp.zeros(mean.size, bool).at[chosen].set(True).reshape(x.shape)

        def sent() -> Array:
            return jnp.where(applied, self.decode(message, like), jnp.zeros((), x.dtype))

        return Outcome(
            aggregate=jnp.where(applied, mean.reshape(x.shape), jnp.zeros((), x.dtype)),
            state=state,
            sent=sent,
            residual=lambda: x - sent(),
            support=lambda: applied & self.support(x, message),
        )

    def alpha(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, shape: Shape, num_workers: int = 1
    ) -> float | None:
        """k/d for one worker; none for several, whose values may all be kept back."""
        return super().alpha(shape) if num_workers == 1 else None


def global_top_k_of_sum(
    ratio: float | None = None, *, k: int | None = None, tree: bool = False
) -> Compressor:
    """gTop-k: of the sum of all workers' top-k messages, only the k largest are applied.

    A worker has *sent* those of its top-k values whose coordinate is among the k that are applied;
    error feedback gets the others back. For one worker it is top-k (alpha = k/d); for several no
    constant is known.

    By gather, each worker sends its top-k, everybody adds them up and keeps the k largest
    magnitudes of the sum: the aggregate is exactly the mean of what was sent (additive).

    With ``tree``, as published, the messages are merged pairwise in log2 n rounds: worker i + 2^j
    sends k pairs to worker i, which keeps the k largest of both; in the end worker 0 tells all
    others, by an all-reduce to which they add zeros. Then k pairs cross every link whatever n is.
    A value that was dropped on one branch, while another branch brought the same coordinate to the
    end, is neither applied nor given back (so it is in the published method): the aggregate is not
    the mean of what was sent, ``additive`` is False, and rules that need it refuse it.

    Args:
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either this or ``ratio``.
      tree: merge pairwise; the number of workers must be a power of two.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)) for each worker, by gather; for the tree as many
      in each of log2 n rounds and once more for the result.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range; at the first
        exchange, for a tree over a number of workers that is no power of two.

    Example:
      Two workers send 3 and 2 at the same place, 4 elsewhere: 5 is the largest of the sum.

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.global_top_k_of_sum(k=1), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=3, axis_name="data")
      >>> params = jnp.zeros(2)
      >>> grads = jnp.array([[3.0, 0.0], [2.5, 0.0], [0.0, 4.5]])
      >>> (3 * tx.update(grads, tx.init(params), params)[0]).tolist()
      [5.5, 0.0]

    References:
      Shi et al., A distributed synchronous SGD algorithm with global top-k sparsification for low
      bandwidth networks, 2019, section III; the tree and what is given back as in the authors'
      public implementation.
    """
    check_ratio_or_k("global_top_k_of_sum", ratio, k)
    check.flag("global_top_k_of_sum", "tree", tree)
    return Compressor(GlobalTopKTree(ratio, k) if tree else GlobalTopKOfSum(ratio, k))
