"""Count sketches: a linear summary from which the large coordinates of a sum can be found."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.random import as_key, random_words
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import scatter


def hashes(key: Array, rows: int, columns: int, size: int) -> tuple[Array, Array]:
    """A bucket in 0 ... columns - 1 and a sign for each row and coordinate, both (rows, size)."""
    words = random_words(key, (rows, size))
    # The sign is the top bit and the bucket the rest, so they are independent.
    bucket = (words & jnp.uint32(0x7FFFFFFF)) % jnp.uint32(columns)
    return bucket.astype(jnp.int32), jnp.where(words >> 31 == 0, 1, -1)


def sketch(x: Array, key: Array, rows: int, columns: int) -> Array:
    """The table ``T[r, j] = sum over h_r(i) = j of s_r(i) x_i`` of a flat vector."""
    bucket, sign = hashes(key, rows, columns, x.size)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    table = jnp.zeros((rows, columns), x.dtype)
    return table.at[row, bucket].add(sign.astype(x.dtype) * x)


def sketch_estimates(table: Array, key: Array, size: int) -> Array:
    """The median over the rows of ``s_r(i) T[r, h_r(i)]`` for each coordinate i."""
    rows, columns = table.shape
    bucket, sign = hashes(key, rows, columns, size)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.median(sign.astype(table.dtype) * table[row, bucket], axis=0)


@dataclasses.dataclass(frozen=True)
class CountSketch(MessagelessCodec):
    """The k largest coordinates of the mean, according to its sketch, with their exact values."""

    rows: int
    columns: int
    key: Array
    ratio: float | None = None
    k: int | None = None

    why: ClassVar[str] = (
        "which values are sent depends on the sum over all workers. Use it in error_feedback or "
        "compressed_mean."
    )

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=False, independent=False)

    def count(self, size: int) -> int:
        """Number of values sent in the second round."""
        return resolve_k(self.ratio, self.k, size)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        like, flat = like_of(x), x.reshape(-1)
        key = workers.fold(self.key, shared=True)
        table = yield Mean(sketch(flat.astype(wide_dtype(x.dtype)), key, self.rows, self.columns))
        indices = top_k_indices(sketch_estimates(table, key, flat.size), self.count(flat.size))
        values = flat[indices]
        mean = yield Mean(values)

        def support() -> Array:
            return jnp.zeros(x.size, bool).at[indices].set(True).reshape(x.shape)

        return Outcome(
            aggregate=scatter(mean, indices, like),
            state=state,
            sent=lambda: scatter(values, indices, like),
            residual=lambda: flat.at[indices].set(0).reshape(x.shape),
            support=support,
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        del num_workers
        table = self.rows * self.columns * bits_of(wide_dtype(dtype))
        return table, self.count(size_of(shape)) * bits_of(dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def count_sketch(
    rows: int,
    columns: int,
    ratio: float | None = None,
    *,
    k: int | None = None,
    key: Any = 0,
) -> Compressor:
    """Sketched SGD: finds the largest coordinates of the *mean* without sending an index.

    Round one averages the workers' count sketches, which have rows x columns numbers for a leaf of
    any size. The median over the rows estimates each coordinate of the mean. Round two averages the
    exact values at the k largest estimates, which are the same on all workers. No contraction
    constant is known. Every step draws new hashes.

    Args:
      rows: number of hash functions; an odd number from 3 to 7 gives a clean median.
      columns: buckets of each hash function; a few times k.
      ratio: kept / total in (0, 1].
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.
      key: a JAX random key or an int for the hashes, the same on all workers.

    Returns:
      The compressor. Bits: 32 rows columns, then 32 k.

    Raises:
      ValueError: for a bad ``rows``, ``columns``, ``ratio`` or ``k``.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor, x = ef.count_sketch(3, 16, k=2), np.zeros(100, "f4")
      >>> x[7], x[50] = 5.0, -3.0
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> np.array_equal(out, x), compressor.bits((100,))
      (True, 1600)

    References:
      Ivkin et al., Communication-efficient distributed SGD with sketching, 2019, Algorithm 2;
      Charikar, Chen, Farach-Colton, Finding frequent items in data streams, 2002.
    """
    check.count("count_sketch", "rows", rows)
    check.count("count_sketch", "columns", columns)
    check_ratio_or_k("count_sketch", ratio, k)
    return Compressor(CountSketch(rows, columns, as_key(key, "count_sketch"), ratio, k))
