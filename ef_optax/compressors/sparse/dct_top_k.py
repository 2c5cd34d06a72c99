"""Top-k of the cosine transform of chunks, as in DeMo."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.matrix import Matrices, largest_divisor, matrix_view
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors.compressor import Compressor


@functools.cache
def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II: row f holds cos(pi (2t + 1) f / 2n), scaled to length 1.

    >>> np.round(dct_matrix(2), 4).tolist()
    [[0.7071, 0.7071], [0.7071, -0.7071]]
    """
    time = np.arange(size)
    rows = np.cos(np.pi * (2 * time + 1) * time[:, None] / (2 * size)) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows


@dataclasses.dataclass(frozen=True)
class DctTopK(Codec):
    """The k largest cosine coefficients of each chunk of the leaf's matrix."""

    chunk: int
    k: int
    batch_axes: int = 0

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def plan(self, shape: Shape) -> tuple[int, int, int, int, int]:
        """Rows of all matrices, their columns, both sides of a chunk, and its number of values."""
        view = matrix_view(shape, self.batch_axes) or Matrices((), 1, size_of(shape))
        a, b = (largest_divisor(max(1, side), self.chunk) for side in (view.rows, view.columns))
        k = min(self.k, a * b) if view.columns else 0
        return view.number * view.rows, view.columns, a, b, k

    def chunks(self, shape: Shape) -> int:
        """Number of chunks."""
        rows, columns, a, b, _ = self.plan(shape)
        return rows * columns // (a * b)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows, columns, a, b, k = self.plan(x.shape)
        wide = x.astype(wide_dtype(x.dtype)).reshape(rows // a, a, columns // b, b)
        left, right = self._bases(a, b, wide.dtype)
        spectrum = einsum("fa,iajb,gb->ijfg", left, wide, right).reshape(-1, a * b)
        indices = jax.vmap(lambda row: top_k_indices(row, k))(spectrum)
        values = jnp.take_along_axis(spectrum, indices, axis=1)
        width = bits_for(a * b)
        return {"indices": fields.pack(indices.reshape(-1), width), "values": values.reshape(-1)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        one = jax.tree.map(lambda m: m[None], message)
        return self._inverse(self._spectrum(one, like.shape), like)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """Adds the spectra and transforms the sum back."""
        n = messages["values"].shape[0]
        values = messages["values"]
        if weights is not None:
            values = values * weights[:, None].astype(values.dtype)
        values = values / jnp.asarray(n if total is None else total, values.dtype)
        spectrum = self._spectrum({**messages, "values": values}, like.shape)
        return self._inverse(spectrum, like)

    def _spectrum(self, messages: Message, shape: Shape) -> Array:
        """The sum of the coefficients of several messages, which are stacked along a first axis."""
        _, _, a, b, k = self.plan(shape)
        chunks, values = self.chunks(shape), messages["values"]
        width = bits_for(a * b)
        local = jax.vmap(lambda w: fields.unpack(w, width, chunks * k))(messages["indices"])
        start = jnp.repeat(jnp.arange(chunks, dtype=jnp.uint32) * jnp.uint32(a * b), k)
        flat = jnp.zeros(chunks * a * b, values.dtype)
        return flat.at[(local + start).reshape(-1)].add(values.reshape(-1), mode="drop")

    def _inverse(self, spectrum: Array, like: jax.ShapeDtypeStruct) -> Array:
        rows, columns, a, b, _ = self.plan(like.shape)
        left, right = self._bases(a, b, spectrum.dtype)
        spectrum = spectrum.reshape(rows // a, columns // b, a, b)
        x = einsum("fa,ijfg,gb->iajb", left, spectrum, right)
        return x.astype(like.dtype).reshape(like.shape)

    @staticmethod
    def _bases(a: int, b: int, dtype: Any) -> tuple[Array, Array]:
        return jnp.asarray(dct_matrix(a), dtype), jnp.asarray(dct_matrix(b), dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        _, _, a, b, k = self.plan(shape)
        return self.chunks(shape) * k * (bits_of(wide_dtype(dtype)) + bits_for(a * b))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """k/(a b), since the transform is orthonormal."""
        del num_workers
        _, _, a, b, k = self.plan(shape)
        return k / (a * b) if k else 1.0


def dct_top_k(chunk: int, k: int, *, batch_axes: int = 0) -> Compressor:
    """Keeps the k largest cosine coefficients of every chunk of a leaf.

    The leaf as a matrix (all but the last axis by the last axis) is cut into chunks a x b, where a
    and b are the largest divisors of its sides up to ``chunk``. A vector is cut in the same way
    along its only side. Each chunk is transformed by the orthonormal DCT-II, its k largest
    coefficients are sent, and the receiver transforms back. alpha = k/(a b) (exact). If a side is a
    large prime, its chunks have length 1, so it is not compressed along that side.

    Args:
      chunk: the largest side of a chunk; 64 in DeMo.
      k: coefficients kept of each chunk; 32 in DeMo.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: chunks times k (32 + ceil(log2 a b)).

    Raises:
      ValueError: for a bad ``chunk``, ``k`` or ``batch_axes``.

    Example:
      A constant leaf is one coefficient:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.dct_top_k(8, 1)
      >>> out, _ = compressor.update(jnp.full((8, 4), 3.0), compressor.init(None))
      >>> bool(jnp.allclose(out, 3.0)), compressor.bits((8, 4))
      (True, 37)

    References:
      Peng, Quesnelle, Kingma, DeMo: decoupled momentum optimization, 2024, and its public code.
    """
    check.count("dct_top_k", "chunk", chunk)
    check.count("dct_top_k", "k", k)
    check.count("dct_top_k", "batch_axes", batch_axes, least=0)
    return Compressor(DctTopK(chunk, k, batch_axes))
