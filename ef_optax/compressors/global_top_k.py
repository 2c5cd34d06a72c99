"""Top-k over more than one leaf, and over more than one worker."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check
from ef_optax._base import (
    Array,
    Codec,
    Gather,
    Gathered,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    all_finite,
    like_of,
)
from ef_optax._compressor import Compressor
from ef_optax._selection import top_k_indices
from ef_optax._whole import Whole
from ef_optax.compressors.global_top_k_tree import GlobalTopKTree
from ef_optax.compressors.sparsify import TopK, check_ratio_or_k


@dataclasses.dataclass(frozen=True)
class GlobalTopK(Codec):
    """Top-k of all leaves as one vector, in the order of the tree."""

    inner: TopK
    granularity: ClassVar[str] = "group"
    basis: ClassVar[str] = "exact"

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self.inner.encode(x, key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self.inner.decode(message, like)

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        dtype = jnp.result_type(*(leaf.dtype for leaf in x)) if _alike(x) else jnp.float32
        whole = Whole(tuple(like_of(leaf) for leaf in x), jnp.dtype(dtype), workers.step)
        like = jax.ShapeDtypeStruct((whole.size,), dtype)
        indices, values = whole.top_k(x, self.inner.count(whole.size))
        message = self.inner.message(values, indices, whole.size)
        got: Gathered = yield Gather(message, all_finite([values], local=True))
        weighted = self.inner.contributions(got.messages, like, got.weights, got.total)
        own = indices[None], values[None]
        return Outcome(
            aggregate=whole.scatter(*weighted),
            state=state,
            sent=lambda: whole.scatter(*own),
            residual=lambda: whole.add(x, own[0], -own[1]),
            support=lambda: [marks != 0 for marks in whole.scatter(own[0], jnp.ones_like(own[1]))],
        )

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Of all leaves together: ask with their total size."""
        return self.inner.bits(shape, dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """k/d of all leaves together."""
        return self.inner.alpha(shape, num_workers)


def _alike(leaves: list[Array]) -> bool:
    return len({leaf.dtype for leaf in leaves}) == 1


@dataclasses.dataclass(frozen=True)
class GlobalTopKOfSum(TopK):
    """Of the sum of the workers' top-k messages the k largest are applied; the rest is kept."""

    independent: ClassVar[bool] = False

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


def global_top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """Top-k over the whole tree: one budget, and leaves with small gradients may send nothing.

    The k largest magnitudes of all leaves together, k from their total size; ties go to the
    earlier leaf and index. alpha = k/d for the whole (exact). Leaves of different dtypes are
    compared and sent in float32; what is not sent keeps its dtype. On parameters split over model
    axes, each slice of the leaves that are split alike has its own budget.

    It is, to the bit, ``top_k`` inside ``optax.flatten``. On a CPU, from a million values on, no
    vector of all leaves is made: one threshold is searched over all of them, and each is read and
    written where it lies. Elsewhere, and for workers simulated by ``vmap``, they are joined.

    Args:
      ratio: kept / total in (0, 1] of all leaves together.
      k: number of values kept in all; give either this or ``ratio``.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)), d the size of all leaves; ``bits`` is asked
      with that size.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.global_top_k(k=2)
      >>> tree = {"a": jnp.array([1.0, -5.0]), "b": jnp.array([[4.0], [3.0]])}
      >>> out, _ = compressor.update(tree, compressor.init(tree))
      >>> out["a"].tolist(), out["b"].tolist()
      ([0.0, -5.0], [[4.0], [0.0]])

    References:
      Aji, Heafield, Sparse communication for distributed gradient descent, 2017.
    """
    check_ratio_or_k("global_top_k", ratio, k)
    return Compressor(GlobalTopK(TopK(ratio, k)))


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
      >>> tx = ef.compressed_mean(ef.global_top_k_of_sum(k=1), axis_name="data")
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
    _check.flag("global_top_k_of_sum", "tree", tree)
    return Compressor(GlobalTopKTree(ratio, k) if tree else GlobalTopKOfSum(ratio, k))
