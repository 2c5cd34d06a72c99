"""1-bit SGD: one bit per value, and two reconstruction values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._bits.bitmask import count_ones
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.matrix import matrix_view
from ef_optax._numeric.norms import leaf_sums
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class TwoMeanSign(Codec):
    """The mean of the values >= 0 if x >= 0, else the mean of the negative ones."""

    columns: bool = False
    batch_axes: int = 0

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def _matrices(self, shape: Shape) -> tuple[int, int, int]:
        """Count, rows and columns of the matrices; without ``columns`` the leaf is one column."""
        view = matrix_view(shape, self.batch_axes) if self.columns else None
        return (view.number, view.rows, view.columns) if view else (1, size_of(shape), 1)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        wide = x.astype(wide_dtype(x.dtype))
        signs = fields.pack_signs(x.reshape(-1))
        if self._matrices(x.shape)[2] == 1:
            counts, sums = self._of_leaf(wide, signs)
        else:
            counts, sums = self._of_columns(wide)
        means = [s / jnp.maximum(n, 1).astype(s.dtype) for s, n in zip(sums, counts, strict=True)]
        return {"signs": signs, "plus": means[0].reshape(-1), "minus": means[1].reshape(-1)}

    @staticmethod
    def _of_leaf(x: Array, signs: fields.Packed) -> tuple[list[Array], list[Array]]:
        """The numbers of values >= 0 and of negative ones, and the sums of both."""
        plus = count_ones(signs.words)
        above, below = jnp.where(x >= 0, x, 0), jnp.where(x >= 0, 0, x)
        sums = leaf_sums(above, below)
        return [plus, np.uint32(x.size) - plus], list(sums)

    def _of_columns(self, x: Array) -> tuple[list[Array], list[Array]]:
        """Like :meth:`_of_leaf`, for each column."""
        matrix = x.reshape(self._matrices(x.shape))
        masks = [matrix >= 0, ~(matrix >= 0)]
        sums = [jnp.sum(jnp.where(mask, matrix, 0), axis=1) for mask in masks]
        return [jnp.sum(mask, axis=1) for mask in masks], sums

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        plus = fields.unpack(message["signs"], 1, size_of(like.shape)) == 1
        count, rows, columns = self._matrices(like.shape)
        plus = plus.reshape(count, rows, columns)
        above, below = (message[k].reshape(count, 1, columns) for k in ("plus", "minus"))
        values = jnp.where(plus, above, below)
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        count, _, columns = self._matrices(shape)
        return size_of(shape) + 2 * count * columns * bits_of(wide_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/rows, attained by a single positive spike in each column."""
        del num_workers
        return 1 / max(1, self._matrices(shape)[1])


def two_mean_sign(*, columns: bool = False, batch_axes: int = 0) -> Compressor:
    """1-bit SGD: one bit per value, which is decoded as the mean of its side of zero.

    ``C(x)_i`` is the mean of all values >= 0 if ``x_i >= 0``, else the mean of the negative ones.
    These are the best two values for a threshold at 0, so the error is never above that of
    :func:`ef_optax.scaled_sign`. alpha = 1/d, or 1/rows for columns (exact).

    Args:
      columns: True for two means per column (index of the last axis) of leaves with two or more
        axes, as published; False for two means per leaf.
      batch_axes: with columns, the number of leading axes that are not part of the matrix: 1 for
        layers that are stacked for a scan; each layer's columns then have their own means.

    Returns:
      The compressor. Bits: d + 64, or d + 64 columns.

    Raises:
      ValueError: for a bad ``batch_axes``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.two_mean_sign()
      >>> compressor.update(jnp.array([-1.0, -3.0, 2.0, 4.0]), compressor.init(None))[0].tolist()
      [-2.0, -2.0, 3.0, 3.0]

    References:
      Seide, Fu, Droppo, Li, Yu, 1-bit stochastic gradient descent, 2014, section 3.
    """
    check.flag("two_mean_sign", "columns", columns)
    check.count("two_mean_sign", "batch_axes", batch_axes, least=0)
    return Compressor(TwoMeanSign(columns, batch_axes))
