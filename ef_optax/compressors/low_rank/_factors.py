"""Low-rank messages of single workers, for the best approximation and for ATOMO's unbiased one."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import matmul
from ef_optax._numeric.matrix import Matrices, low_rank_product, matrix_view
from ef_optax._numeric.shapes import Shape, size_of


@dataclasses.dataclass(frozen=True)
class FactorCodec(Codec):
    """Messages (left, right) of c columns and c rows; dense, if these are not smaller."""

    rank: int
    batch_axes: int

    @abc.abstractmethod
    def room(self) -> int:
        """The most rank-one terms that the message of a large matrix holds."""

    @abc.abstractmethod
    def factors(self, matrices: Array, terms: int, key: Array | None) -> tuple[Array, Array]:
        """Left (count, rows, terms) and right (count, terms, columns) factors of the matrices."""

    def plan(self, shape: Shape) -> tuple[Matrices, int] | None:
        """The leaf's matrices and the number of terms of each, or None for a dense message."""
        matrices = matrix_view(shape, self.batch_axes)
        if matrices is None:
            return None
        terms = min(self.room(), matrices.rows, matrices.columns)
        saves = terms * (matrices.rows + matrices.columns) < matrices.rows * matrices.columns
        return (matrices, terms) if saves else None

    def encode(self, x: Array, key: Array | None = None) -> Message:
        plan = self.plan(x.shape)
        if plan is None:
            return x.reshape(-1)
        (_, rows, columns), terms = plan
        wide = x.astype(wide_dtype(x.dtype)).reshape(-1, rows, columns)
        left, right = self.factors(wide, terms, key)
        return {"left": left.reshape(-1), "right": right.reshape(-1)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        plan = self.plan(like.shape)
        if plan is None:
            return message.astype(like.dtype).reshape(like.shape)
        (_, rows, columns), terms = plan
        left = message["left"].reshape(-1, rows, terms)
        value = low_rank_product(left, message["right"].reshape(-1, terms, columns))
        return value.astype(like.dtype).reshape(like.shape)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """One product, in which the factors of all workers stand side by side."""
        plan = self.plan(like.shape)
        if plan is None:
            return super().decode_mean(messages, like, weights, total)
        matrices, terms = plan
        left = messages["left"].reshape(-1, matrices.number, matrices.rows, terms)
        right = messages["right"].reshape(-1, matrices.number, terms, matrices.columns)
        n = left.shape[0]
        if weights is not None:
            left = left * weights[:, None, None, None].astype(left.dtype)
        wide = jnp.moveaxis(left, 0, 2).reshape(matrices.number, matrices.rows, n * terms)
        tall = jnp.moveaxis(right, 0, 1).reshape(matrices.number, n * terms, matrices.columns)
        mean = matmul(wide, tall) / jnp.asarray(n if total is None else total, left.dtype)
        return mean.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        plan = self.plan(shape)
        if plan is None:
            return size_of(shape) * bits_of(dtype)
        matrices, terms = plan
        elements = matrices.number * terms * (matrices.rows + matrices.columns)
        return elements * bits_of(wide_dtype(dtype))
