"""Global top-k: the k largest entries of the whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite
from ef_optax._numeric.shapes import Shape, like_of
from ef_optax._select.whole import Whole
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse.top_k import TopK


@dataclasses.dataclass(frozen=True)
class GlobalTopK(Codec):
    """Top-k of all leaves as one vector, in the order of the tree."""

    inner: TopK

    @property
    def traits(self) -> Traits:
        return Traits(granularity="group", basis="exact")

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
        """Bits for all leaves together; ``shape`` is their total size."""
        return self.inner.bits(shape, dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """k/d for all leaves together; ``shape`` is their total size."""
        return self.inner.alpha(shape, num_workers)


def _alike(leaves: list[Array]) -> bool:
    return len({leaf.dtype for leaf in leaves}) == 1


def global_top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """Top-k over the whole tree, so that leaves with small gradients may send nothing.

    It sends the k largest magnitudes of all leaves together, where k depends on their total size;
    ties go to the earlier leaf and index. alpha = k/d over all leaves (exact). Leaves of different
    dtypes are compared and sent in float32; what is not sent keeps its dtype. If parameters are
    split over model axes, each group of slices that are split alike has its own k.

    The result is, to the bit, that of ``top_k`` inside ``optax.flatten``. On a CPU, from a million
    values on, the leaves are not joined into one vector: one threshold is searched over all of
    them, and each is updated in place. On other devices, and for workers simulated by ``vmap``,
    they are joined.

    Args:
      ratio: kept / total in (0, 1], for all leaves together.
      k: number of values kept of all leaves together; give either ``k`` or ``ratio``.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)), where d is the total size of all leaves; call
      ``bits`` with that size.

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
