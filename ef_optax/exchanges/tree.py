"""gTop-k: the workers' top-k messages are merged pairwise in a tree, k pairs at every edge."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Message, Permute, Sum
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, bits_for, like_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors.sparse.top_k import TopK


@dataclasses.dataclass(frozen=True)
class GlobalTopKTree(TopK):
    """Worker 0 ends up with the k largest of repeated pairwise sums, and tells everybody."""

    @property
    def traits(self) -> Traits:
        alone = super().traits
        return dataclasses.replace(alone, additive=False, independent=False, broadcast=False)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        n, like = workers.size, like_of(x)
        rounds = tree_rounds(n)
        own = self.encode(x)
        indices, values = self.parts(own, like)
        for j in range(rounds):
            step = 1 << j
            pairs = tuple((i + step, i) for i in range(0, n, 2 * step))
            received = yield Permute(self._message(indices, values, x.size), pairs)
            merged = merge(indices, values, *self.parts(received, like))
            receives = workers.index % (2 * step) == 0
            indices = jnp.where(receives, merged[0], indices)
            values = jnp.where(receives, merged[1], values)
        message = self._message(indices, values, x.size)
        # Only worker 0's words are not zero, so the sum is its message.
        words = yield Sum(jnp.where(workers.index == 0, fields.to_words(message), 0))
        result = fields.from_words(words, message)
        chosen, _ = self.parts(result, like)
        applied = jnp.zeros(x.size, bool).at[chosen].set(True).reshape(x.shape)

        def sent() -> Array:
            return jnp.where(applied, self.decode(own, like), jnp.zeros((), x.dtype))

        return Outcome(
            aggregate=self.decode(result, like) / jnp.asarray(n, x.dtype),
            state=state,
            sent=sent,
            residual=lambda: x - sent(),
            support=lambda: applied & self.support(x, own),
        )

    @staticmethod
    def _message(indices: Array, values: Array, size: int) -> Message:
        return {"indices": fields.pack(indices, bits_for(size)), "values": values}

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """K pairs from every sender in each round of the tree, and k pairs to all at the end."""
        return (self.bits(shape, dtype),) * (tree_rounds(num_workers) + 1)

    def alpha(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, shape: Shape, num_workers: int = 1
    ) -> float | None:
        """k/d for one worker; none for several, whose values may all be kept back."""
        return super().alpha(shape) if num_workers == 1 else None


def tree_rounds(num_workers: int) -> int:
    """log2 n, for a power of two.

    >>> tree_rounds(8)
    3
    """
    if num_workers & (num_workers - 1):
        raise ValueError(
            f"global_top_k_of_sum(tree=True): {num_workers} workers cannot be merged in pairs; use "
            "a power of two, or tree=False, which gathers."
        )
    return num_workers.bit_length() - 1


def merge(a: Array, x: Array, b: Array, y: Array) -> tuple[Array, Array]:
    """The k largest magnitudes of the sum of two sparse vectors of k entries each.

    Args:
      a: indices of the first, (k,) uint32; an index may stand there twice, with value 0.
      x: its values, (k,).
      b: indices of the second.
      y: its values.

    Returns:
      Indices and values; of equal magnitudes the lowest index is taken.

    Example:
      >>> indices, values = merge(*map(jnp.asarray, ([0, 3], [1.0, 2.0], [3, 5], [-5.0, 2.0])))
      >>> indices.tolist(), values.tolist()
      ([3, 5], [-3.0, 2.0])
    """
    indices, values = jnp.concatenate([a, b]), jnp.concatenate([x, y])
    order = jnp.argsort(indices, stable=True)
    indices, values = indices[order], values[order]
    first = jnp.concatenate([jnp.ones(1, bool), indices[1:] != indices[:-1]])[: indices.size]
    run = jnp.cumsum(first) - 1
    sums = jax.ops.segment_sum(values, run, num_segments=values.size)
    total = jnp.where(first, sums[run], jnp.zeros((), values.dtype))
    kept = top_k_indices(total, x.size)
    return indices[kept], total[kept]
