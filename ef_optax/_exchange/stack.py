"""Equal leaves as one: ``vmap`` applies a codec to a stack of leaves.

A network has many leaves of equal shape, and compiling the same encoder for each of them is most of
the compile time. Large leaves are not stacked, because stacking copies them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape

STACK_LIMIT = 1 << 16
"""Leaves with more elements than this are not stacked: the copy would cost more than it saves."""


def stackable(codec: Codec, x: Array) -> bool:
    """Whether leaves like ``x`` may be stacked: the codec only encodes, and x is small."""
    return codec.self_contained and codec.transport.stacks and x.size <= STACK_LIMIT


@dataclasses.dataclass(frozen=True)
class Stacked(Codec):
    """``inner`` on each of several equal leaves, which are stacked along a leading axis."""

    inner: Codec

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=self.inner.deterministic)

    def step_key(self, workers: Workers) -> Array | None:
        if self.deterministic:
            return None

        def one(path: Array) -> Array:
            key = self.inner.step_key(dataclasses.replace(workers, path=path))
            assert key is not None
            return key

        return jax.vmap(one)(workers.path)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        if key is None:
            return jax.vmap(self.inner.encode)(x)
        return jax.vmap(self.inner.encode)(x, key)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        one = self._one(like)
        return jax.vmap(lambda m: self.inner.decode(m, one))(message)

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        one = self._one(like)
        mean = jax.vmap(lambda m: self.inner.decode_mean(m, one, weights, total), in_axes=1)
        return mean(messages)

    def residual(self, x: Array, message: Message) -> Array:
        return jax.vmap(self.inner.residual)(x, message)

    def support(self, x: Array, message: Message) -> Array:
        return jax.vmap(self.inner.support)(x, message)

    def finite(self, x: Array, message: Message) -> Array:
        return jnp.all(jax.vmap(self.inner.finite)(x, message))

    def bits(self, shape: Shape, dtype: Any = None) -> int:
        raise AssertionError("a stack is never asked for bits; its leaves' codec is")

    @staticmethod
    def _one(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
