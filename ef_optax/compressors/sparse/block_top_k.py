"""Top-k in blocks, with short indices, no compaction, and equal work in all blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax import _kernels
from ef_optax._bits import fields
from ef_optax._core.joinable import JointCodec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax._select.leaf import SORT_SIZE, top_k_indices
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._rows import RowCodec, SparseRows
from ef_optax.compressors.sparse._sparse import Followable


@dataclasses.dataclass(frozen=True)
class BlockTopK(Followable, RowCodec):
    """The k_b largest magnitudes of each block, where k_b depends on the block's length."""

    ratio: float | None
    k: int | None
    block: int

    @property
    def separable_into(self) -> int | None:
        return self.block

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def _plan(self, size: int) -> tuple[int, int, int, int, int]:
        """Block length, full blocks, k of each, length of the last, shorter block, and its k."""
        length = min(self.block, size)
        full, rest = divmod(size, length) if size else (0, 0)
        return (
            length,
            full,
            resolve_k(self.ratio, self.k, length),
            rest,
            resolve_k(self.ratio, self.k, rest),
        )

    def count(self, size: int) -> int:
        _, full, k, _, last = self._plan(size)
        return full * k + last

    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """The width of the indices of a small leaf, whose blocks are sorted one by one anyway.

        Zeros are sorted too, so the rows of a family differ by no more than a half.
        """
        size = size_of(like.shape)
        if not 0 < self.count(size) < size <= SORT_SIZE:
            return None
        length = self._plan(size)[0]
        width = bits_for(length)
        return width, length > 3 * 2**width // 4

    def joint(self, like: jax.ShapeDtypeStruct) -> JointCodec:
        del like
        return SparseRows(self)

    def rows(self, size: int) -> tuple[int, list[int]]:
        length, full, k, rest, last = self._plan(size)
        return length, [k] * full + [last] * bool(rest)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1)
        length, full, k, rest, last = self._plan(flat.size)
        local = []
        if full:
            local.append(_kernels.block_top_k_indices(flat, length, k).reshape(-1))
        if rest:
            local.append(top_k_indices(flat[full * length :], last))
        indices = jnp.concatenate(local) if local else jnp.zeros(0, jnp.int32)
        return {
            "indices": fields.pack(indices, bits_for(length)),
            "values": flat[self._global(indices.astype(jnp.uint32), flat.size)],
        }

    def _global(self, local: Array, size: int) -> Array:
        """Indices in the leaf, from indices in its blocks."""
        length, full, k, _, last = self._plan(size)
        start = jnp.repeat(jnp.arange(full, dtype=jnp.uint32) * jnp.uint32(length), k)
        end = jnp.full((last,), full * length, jnp.uint32)
        return local + jnp.concatenate([start, end])

    def finite(self, x: Array, message: Message) -> Array:
        """Checks only the message: inf and NaN are the largest of their block, so one is sent."""
        del x
        return jnp.all(jnp.isfinite(message["values"]))

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        width = bits_for(self._plan(size)[0])
        local = fields.unpack(message["indices"], width, self.count(size))
        return self._global(local, size), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return self.count(size) * (bits_of(dtype) + bits_for(self._plan(size)[0]))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """The least k_b/d_b over the blocks."""
        del num_workers
        length, full, k, rest, last = self._plan(size_of(shape))
        shares = ([k / length] if full else []) + ([last / rest] if rest else [])
        return min(shares, default=1.0)


def block_top_k(
    ratio: float | None = None, *, k: int | None = None, block: int = 4096
) -> Compressor:
    """Keeps the k largest magnitudes of every block of a leaf; ties go to the lowest index.

    The flattened leaf is cut into blocks, of which the last may be shorter, and each block's length
    determines its k. Indices within a block of 4096 need 12 bits, whatever the size of the leaf, so
    top-1% with float32 values costs 1/72 of the dense array. alpha is the least k_b/d_b (exact).

    Args:
      ratio: kept / total in (0, 1], for each block.
      k: number of values kept of each block; give either ``k`` or ``ratio``.
      block: length of a block.

    Returns:
      The compressor. Bits: sum of k_b (32 + ceil(log2 block)).

    Raises:
      ValueError: for a bad ``ratio``, ``k`` or ``block``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.block_top_k(k=1, block=2)
      >>> compressor.update(jnp.array([1.0, 2.0, 0.5, 0.1, 9.0]), compressor.init(None))[0].tolist()
      [0.0, 2.0, 0.5, 0.0, 9.0]
      >>> round(32 * 4096 / ef.block_top_k(0.01).bits(4096), 1)
      72.7

    References:
      Chunked selection as in Peng, Quesnelle, Kingma, DeMo, 2024, and Sarfi et al., SparseLoCo,
      2025, but of the gradient itself.
    """
    check_ratio_or_k("block_top_k", ratio, k)
    check.count("block_top_k", "block", block)
    return Compressor(BlockTopK(ratio, k, block))
