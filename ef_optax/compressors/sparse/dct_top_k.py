"""Top-k of the cosine transform of chunks, as in DeMo."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.matrix import Matrices, largest_divisor, matrix_view
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._coefficients import CoefficientCodec
from ef_optax.compressors.sparse.block_top_k import BlockTopK


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
class DctTopK(CoefficientCodec):
    """The k largest cosine coefficients of each chunk of the leaf's matrix."""

    chunk: int
    k: int
    batch_axes: int = 0

    def plan(self, shape: Shape) -> tuple[int, int, int, int]:
        """Rows of all matrices, their columns, and both sides of a chunk."""
        view = matrix_view(shape, self.batch_axes) or Matrices((), 1, size_of(shape))
        a, b = (largest_divisor(max(1, side), self.chunk) for side in (view.rows, view.columns))
        return view.number * view.rows, view.columns, a, b

    def inner(self, shape: Shape) -> BlockTopK:
        _, _, a, b = self.plan(shape)
        return BlockTopK(None, self.k, a * b)

    def analysis(self, x: Array) -> Array:
        rows, columns, a, b = self.plan(x.shape)
        wide = x.astype(wide_dtype(x.dtype)).reshape(rows // a, a, columns // b, b)
        left, right = self._bases(a, b, wide.dtype)
        return einsum("fa,iajb,gb->ijfg", left, wide, right).reshape(-1)

    def synthesis(self, coefficients: Array, like: jax.ShapeDtypeStruct) -> Array:
        rows, columns, a, b = self.plan(like.shape)
        left, right = self._bases(a, b, coefficients.dtype)
        spectrum = coefficients.reshape(rows // a, columns // b, a, b)
        x = einsum("fa,ijfg,gb->iajb", left, spectrum, right)
        return x.astype(like.dtype).reshape(like.shape)

    @staticmethod
    def _bases(a: int, b: int, dtype: Any) -> tuple[Array, Array]:
        return jnp.asarray(dct_matrix(a), dtype), jnp.asarray(dct_matrix(b), dtype)


def dct_top_k(chunk: int, k: int, *, batch_axes: int = 0) -> Compressor:
    """Keeps the k largest cosine coefficients of every chunk of a leaf.

    The leaf as a matrix (all but the last axis by the last axis) is cut into chunks a x b, where a
    and b are the largest divisors of its sides up to ``chunk``. A vector is cut in the same way
    along its only side. Each chunk is transformed by the orthonormal DCT-II, its k largest
    coefficients are sent, and the receiver transforms back. alpha = k/(a b) (exact). If a side is a
    large prime, its chunks have length 1, so it is not compressed along that side.

    DeMo averages each coefficient over the workers that sent it
    (:func:`ef_optax.exchanges.mean_of_senders`), not over all of them.

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

      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.dct_top_k(8, 1)
      >>> out, _ = jax.jit(compressor.update)(np.full((8, 4), 3.0, "f4"), compressor.init(None))
      >>> np.allclose(out, 3.0), compressor.bits((8, 4))
      (True, 37)

    References:
      Peng, Quesnelle, Kingma, DeMo: decoupled momentum optimization, 2024, and its public code.
    """
    check.count("dct_top_k", "chunk", chunk)
    check.count("dct_top_k", "k", k)
    check.count("dct_top_k", "batch_axes", batch_axes, least=0)
    return Compressor(DctTopK(chunk, k, batch_axes))
