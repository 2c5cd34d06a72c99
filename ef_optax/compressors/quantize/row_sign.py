"""The scaled sign with a scale for each row: rows of zeros stay zero."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._sign import SignCodec


@dataclasses.dataclass(frozen=True)
class RowSign(SignCodec):
    """``C(x)_r = (||x_r||_1 / w) sign(x_r)`` of each row r of w values, sign(0) = +1."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, basis="exact")

    def scale(self, x: Array) -> Array:
        rows = x.reshape(_rows(x.shape))
        width = float(max(1, rows.shape[1]))
        return jnp.sum(jnp.abs(rows), axis=1, dtype=scale_dtype(x.dtype)) / width

    def encode(self, x: Array, key: Array | None = None) -> dict[str, Any]:
        return {**super().encode(x, key), "scale": self.scale(x)}

    def decode(self, message: Any, like: jax.ShapeDtypeStruct) -> Array:
        one = jnp.ones((1,), message["scale"].dtype)
        signs = super().decode({**message, "scale": one}, like).reshape(_rows(like.shape))
        return (signs * message["scale"].astype(like.dtype)[:, None]).reshape(like.shape)

    def residual(self, x: Array, message: Any) -> Array:
        scale = message["scale"].astype(x.dtype)[:, None]
        rows = x.reshape(_rows(x.shape))
        return (rows - jnp.where(rows >= 0, scale, -scale)).reshape(x.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) + _rows(shape)[0] * bits_of(scale_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/w, the worst case over x: one value in each row."""
        del num_workers
        return 1.0 / max(1, _rows(shape)[1])


def _rows(shape: Shape) -> tuple[int, int]:
    """Rows, and values in each; a leaf of less than two dimensions is one row."""
    if isinstance(shape, int) or len(shape) < 2:
        return 1, size_of(shape)
    return math.prod(shape[:-1]), shape[-1]


def row_sign() -> Compressor:
    """Signs times the mean magnitude of each row: ``C(x)_r = (||x_r||_1 / w) sign(x_r)``.

    A row is all that lies along the last axis, w values; sign(0) = +1. A row of zeros stays zero,
    where :func:`scaled_sign` moves every value by the one scale of the leaf. So this is the sign
    for embeddings: the gradient of a token that does not occur is a row of zeros. alpha is 1/w, and
    ``||x_r||_1^2 / (w ||x_r||_2^2)`` of a given row (exact).

    Returns:
      The compressor. Bits: d + 32 for each row; a word holds 32 signs.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.row_sign()
      >>> x = jnp.array([[3.0, -1.0], [0.0, 0.0]])
      >>> compressor.update(x, compressor.init(x))[0].tolist()
      [[2.0, -2.0], [0.0, 0.0]]

    References:
      Zheng, Huang, Kwok, Communication-efficient distributed blockwise momentum SGD with
      error-feedback, 2019, section 3.3: blocks with a scale for each; here a block is a row.
    """
    return Compressor(RowSign())
