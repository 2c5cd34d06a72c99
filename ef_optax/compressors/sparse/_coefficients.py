"""Sparse codecs of coefficients: the leaf is transformed, and some of its coefficients are sent."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.sparse._sparse import Followable


class CoefficientCodec(Codec):
    """``synthesis(C(analysis(x)))`` with an orthonormal transform and a sparsifier C.

    A transport that treats each position by itself works on the coefficients, because theirs are
    the positions that the messages carry.
    """

    @abc.abstractmethod
    def analysis(self, x: Array) -> Array:
        """The coefficients of the leaf, flat and as many as its elements."""

    @abc.abstractmethod
    def synthesis(self, coefficients: Array, like: jax.ShapeDtypeStruct) -> Array:
        """The inverse of :meth:`analysis`."""

    @abc.abstractmethod
    def inner(self, shape: Shape) -> Followable:
        """The codec C of the coefficients of a leaf of this shape."""

    @property
    def traits(self) -> Traits:
        return Traits(basis="exact")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self.inner(x.shape).encode(self.analysis(x), key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return self.synthesis(self.inner(like.shape).decode(message, _flat(like)), like)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """Averages the coefficients and transforms their mean back."""
        mean = self.inner(like.shape).decode_mean(messages, _flat(like), weights, total)
        return self.synthesis(mean, like)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.inner(shape).bits((size_of(shape),), wide_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """That of the codec of the coefficients, since the transform is orthonormal."""
        return self.inner(shape).alpha((size_of(shape),), num_workers)


def _flat(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The coefficients of such a leaf."""
    return jax.ShapeDtypeStruct((size_of(like.shape),), wide_dtype(like.dtype))
