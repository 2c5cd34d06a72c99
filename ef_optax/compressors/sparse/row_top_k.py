"""Row top-k: the k rows of largest norm of each leaf, exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class RowTopK(Codec):
    """The k rows with the largest sums of squares; ties go to the lowest row."""

    ratio: float | None = None
    k: int | None = None

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def rows(self, shape: Shape) -> tuple[int, int, int]:
        """Rows, values in each, and how many rows are kept; a vector has rows of one value."""
        if isinstance(shape, int) or len(shape) < 2:
            count, length = size_of(shape), 1
        else:
            count, length = math.prod(shape[:-1]), shape[-1]
        return count, length, resolve_k(self.ratio, self.k, count) if size_of(shape) else 0

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        count, length, k = self.rows(x.shape)
        rows = x.reshape(count, length)
        wide = rows.astype(wide_dtype(x.dtype))
        largest = jnp.max(jnp.abs(wide), initial=0.0)  # squares must not overflow or underflow
        wide = wide / safe_divisor(largest)
        _, chosen = jax.lax.top_k(jnp.sum(wide * wide, axis=1), k)
        return {"rows": fields.pack(chosen, bits_for(count)), "values": rows[chosen].reshape(-1)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self._added(jnp.zeros(like.shape, like.dtype), message, 1)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """One scatter-add of the rows of all workers, without a dense array for each."""
        values = messages["values"].astype(like.dtype)
        n = values.shape[0]
        if weights is not None:
            values = values * weights[:, None].astype(values.dtype)
        values = values / jnp.asarray(n if total is None else total, values.dtype)
        chosen = jax.vmap(lambda message: self._chosen(message, like.shape))(messages)
        count, length, _ = self.rows(like.shape)
        zeros = jnp.zeros((count, length), like.dtype)
        summed = zeros.at[chosen.reshape(-1)].add(values.reshape(-1, length))
        return summed.reshape(like.shape)

    def residual(self, x: Array, message: Message) -> Array:
        return self._added(x, message, -1)

    def support(self, x: Array, message: Message) -> Array:
        count, length, _ = self.rows(x.shape)
        nothing = jnp.zeros((count, length), bool)
        return nothing.at[self._chosen(message, x.shape)].set(True).reshape(x.shape)

    def _added(self, x: Array, message: Message, sign: int) -> Array:
        """Adds the message to x, or subtracts it."""
        count, length, k = self.rows(x.shape)
        values = sign * message["values"].astype(x.dtype).reshape(k, length)
        rows = x.reshape(count, length).at[self._chosen(message, x.shape)].add(values)
        return rows.reshape(x.shape)

    def _chosen(self, message: Message, shape: Shape) -> Array:
        count, _, k = self.rows(shape)
        return fields.unpack(message["rows"], bits_for(count), k)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        count, length, k = self.rows(shape)
        return k * (length * bits_of(dtype) + bits_for(count))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        count, _, k = self.rows(shape)
        return k / count if k else 1.0


def row_top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """Keeps the k rows of largest norm of every leaf, whole; ties go to the lowest row.

    A row is all that lies along the last axis; each value of a vector is a row. One index serves a
    whole row, so this is top-k for embeddings, whose gradient has few rows that are not zero: with
    at most k such rows nothing is lost. It is also a format for their memory, ``memory=`` of every
    rule. alpha = k/rows (exact for rows of equal norm).

    Args:
      ratio: kept / total rows in (0, 1]; k = min(rows, max(1, ceil(ratio rows))) for each leaf.
      k: number of rows kept of each leaf; give either ``k`` or ``ratio``.

    Returns:
      The compressor. Bits: k (32 columns + ceil(log2 rows)) for float32.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.row_top_k(k=1)
      >>> x = jnp.array([[1.0, -2.0], [0.0, 0.0], [2.0, 0.5]])
      >>> compressor.update(x, compressor.init(x))[0].tolist()
      [[1.0, -2.0], [0.0, 0.0], [0.0, 0.0]]

    References:
      Derived: top-k of row norms; chosen by all workers together it is :func:`arc_top_k`.
    """
    check_ratio_or_k("row_top_k", ratio, k)
    return Compressor(RowTopK(ratio, k))
