"""Top-k: the k entries of largest magnitude of each leaf, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields, packing
from ef_optax._core.joinable import JointCodec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax._select import leaf as leaf_select
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._joint import JointSparse
from ef_optax.compressors.sparse._rows import RowCodec, SparseRows
from ef_optax.compressors.sparse._sparse import Followable, IndexedCodec, by_size


@dataclasses.dataclass(frozen=True)
class TopK(IndexedCodec, Followable, RowCodec):
    """The k largest magnitudes of each leaf; ties go to the lowest index."""

    ratio: float | None = None
    k: int | None = None

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return resolve_k(self.ratio, self.k, size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1)
        indices, values = leaf_select.top_k(flat, self.count(flat.size))
        return self.message(values, indices, flat.size)

    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """The width of the indices, and of large leaves the size of their samples."""
        size = size_of(like.shape)
        plan = leaf_select.plan(size, self.count(size))
        if plan is not None:
            return "sampled", plan.sample, bits_for(size)
        sorted_whole = 0 < self.count(size) < size <= leaf_select.SORT_SIZE
        return ("sorted", bits_for(size)) if sorted_whole else None

    def joint(self, like: jax.ShapeDtypeStruct) -> JointCodec:
        size = size_of(like.shape)
        return SparseRows(self) if size <= leaf_select.SORT_SIZE else JointSparse(self)

    def rows(self, size: int) -> tuple[int, list[int]]:
        return size, [self.count(size)]

    def encode_each(self, xs: Sequence[Array], rows: Sequence[Array | int]) -> list[Message]:
        flats = [x.reshape(-1) for x in xs]
        counts = [self.count(flat.size) for flat in flats]
        indices, values = leaf_select.top_k_of_each(flats, counts, rows)
        width = bits_for(flats[0].size)
        words = jax.vmap(lambda codes: packing.pack(codes, width))(indices)
        messages = []
        for members in by_size(flats):
            count = counts[members[0]]
            own = slice(None) if len(members) == len(xs) else np.asarray(members)
            packed = words[own][:, : packing.packed_words(count, width)]
            field = fields.Packed(packed, count * width)
            messages.append({"indices": field, "values": values[own][:, :count]})
        return messages

    def finite(self, x: Array, message: Message) -> Array:
        """Checks only the message: inf and NaN count as the largest, so one of them is sent."""
        del x
        return jnp.all(jnp.isfinite(message["values"]))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return self.count(size) / size if size else 1.0


def top_k(ratio: float | None = None, *, k: int | None = None) -> Compressor:
    """Keeps the k largest magnitudes of every leaf, exactly; ties go to the lowest index.

    ``C(x)_i = x_i`` if ``|x_i|`` is among the k largest, else 0. It is biased, with contraction
    alpha = k/d (exact for equal magnitudes). Bits: k (32 + ceil(log2 d)) for float32.

    Args:
      ratio: kept / total in (0, 1]; k = min(d, max(1, ceil(ratio d))) for each leaf.
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.

    Returns:
      The compressor. The residual is the input with the sent entries set to zero.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, and in range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.top_k(0.5)
      >>> compressor.update(jnp.array([1.0, 2.0, 3.0, 4.0]), compressor.init(None))[0].tolist()
      [0.0, 0.0, 3.0, 4.0]

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with memory, 2018, Definition 2.1.
    """
    check_ratio_or_k("top_k", ratio, k)
    return Compressor(TopK(ratio, k))
