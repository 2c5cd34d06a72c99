"""A tree: messages are merged pairwise, and only the k largest entries of each merger go on.

round j = 0 .. log2 n - 1:   worker i + 2^j sends k pairs to worker i, a multiple of 2^(j+1),
                             which keeps the k largest magnitudes of the sum
sum:                         worker 0's k pairs to all workers; the others add zeros
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Message, Permute, Sum
from ef_optax._core.traits import Traits
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, bits_for, like_of, size_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import SparseCodec, scatter
from ef_optax.exchanges.carried import SPARSE, carried


@dataclasses.dataclass(frozen=True)
class Tree(Transport):
    """Worker 0 ends up with the k largest of repeated pairwise sums, and sends them to all."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (SPARSE,)

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        assert isinstance(codec, SparseCodec)
        n, like, width = workers.size, like_of(x), bits_for(x.size)
        rounds = tree_rounds(n)
        own = codec.encode(x, codec.step_key(workers))
        indices, values = codec.parts(own, like)
        count = len(values)

        def message() -> Message:
            return {"indices": fields.pack(indices, width), "values": values}

        for j in range(rounds):
            step = 1 << j
            pairs = tuple((i + step, i) for i in range(0, n, 2 * step))
            received = yield Permute(message(), pairs)
            theirs = fields.unpack(received["indices"], width, count), received["values"]
            # Who only sends receives zeros, and never sends again what it merges them with.
            indices, values = merge(indices, values, *theirs)
        last = message()
        # Only worker 0's words are not zero, so the sum is its message.
        words = yield Sum(jnp.where(workers.index == 0, fields.to_words(last), 0))
        result = fields.from_words(words, last)
        chosen = fields.unpack(result["indices"], width, count)
        applied = jnp.zeros(x.size, bool).at[chosen].set(True).reshape(x.shape)

        def sent() -> Array:
            return jnp.where(applied, codec.decode(own, like), jnp.zeros((), x.dtype))

        return Outcome(
            aggregate=scatter(result["values"], chosen, like) / jnp.asarray(n, x.dtype),
            state=state,
            sent=sent,
            residual=lambda: x - sent(),
            support=lambda: applied & codec.support(x, own),
        )

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """K pairs from every sender in each round of the tree, and k pairs to all at the end."""
        assert isinstance(codec, SparseCodec)
        size = size_of(shape)
        pairs = codec.count(size) * (bits_of(dtype) + bits_for(size))
        return (pairs,) * (tree_rounds(num_workers) + 1)

    def traits(self, codec: Codec) -> Traits:
        own = codec.traits
        return dataclasses.replace(
            own, unbiased=False, linear=False, additive=False, independent=False, broadcast=False
        )

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> float | None:
        """The codec's alpha for one worker; None for several, as a worker may send nothing."""
        return codec.alpha(shape) if num_workers == 1 else None


def tree_rounds(num_workers: int) -> int:
    """log2 n, for a power of two.

    >>> tree_rounds(8)
    3
    """
    if num_workers & (num_workers - 1):
        raise ValueError(
            f"tree: {num_workers} workers cannot be merged in pairs; use a power of two of them, "
            "or largest_of_sum (global_top_k_of_sum with tree=False), which gathers."
        )
    return num_workers.bit_length() - 1


def merge(a: Array, x: Array, b: Array, y: Array) -> tuple[Array, Array]:
    """The k largest magnitudes of the sum of two sparse vectors of k entries each.

    Args:
      a: indices of the first vector, (k,) uint32; an index may occur twice if its value is 0.
      x: values of the first vector, (k,).
      b: indices of the second vector.
      y: values of the second vector.

    Returns:
      Indices and values; ties go to the lowest index.

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


def tree(compressor: Compressor) -> Compressor:
    """Merges sparse messages pairwise in log2 n rounds; the k largest of each pair go on.

    Worker i + 2^j sends its k index-value pairs to worker i, which adds both messages and keeps the
    k largest magnitudes. In the end worker 0 sends its pairs to all workers, by an all-reduce to
    which the others add zeros. So k pairs cross every link whatever n is.

    A worker has *sent* those of its values whose coordinates are among the k that are applied;
    error feedback keeps the others. A value that one branch drops, while another branch brings its
    coordinate to the end, is neither applied nor kept, as in the published method. So the aggregate
    is not the mean of what was sent, ``additive`` is False, and rules that need it refuse the tree.

    Args:
      compressor: a sparsifier; k is the number of values that its message can hold.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)) in each of log2 n rounds, and once more for the
      result.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.
      ValueError: if it does not send indices and values; at the first exchange, if the number of
        workers is not a power of two.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.tree(ef.top_k(k=1)), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=2, axis_name="data")
      >>> grads = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> (2 * tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2))[0]).tolist()
      [0.0, 4.0]

    References:
      Shi et al., A distributed synchronous SGD algorithm with global top-k sparsification for low
      bandwidth networks, 2019, section III, and the authors' public implementation.
    """
    return carried("tree", compressor, Tree())
