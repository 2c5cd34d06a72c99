"""Sparsifiers by a threshold, for which the data decide how many values pass.

A message has a fixed capacity c. If fewer values pass, the free slots carry zeros. If more pass,
the c largest are sent; the others are counted, and stay in the residual.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._bits.bitmask import count_ones, positions
from ef_optax._core.requests import Message
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax._select.search import at_least, cut, search
from ef_optax.compressors.sparse._sparse import Followable


class ThresholdCodec(Followable):
    """Sends values whose magnitude reaches a border; subclasses define border and capacity.

    Borders are integers in the order of `_numeric.magnitude.magnitude_order`.
    """

    @abc.abstractmethod
    def border(self, flat: Array) -> Array:
        """The least magnitude that is sent."""

    def kept(self, size: int) -> int:
        """How many of the largest values are sent if more pass than the message can hold."""
        return self.count(size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat, capacity = x.reshape(-1), self.count(x.size)
        if not capacity:
            return {
                "passed": jnp.zeros(1, jnp.uint32),
                "indices": fields.pack(jnp.zeros(0, jnp.uint32), 0),
                "values": flat,
            }
        words = at_least(flat)(self.border(flat))
        passed = count_ones(words)
        fits = passed <= capacity
        words = jax.lax.cond(fits, lambda: words, lambda: _largest(flat, self.kept(x.size)))
        sent = jnp.arange(capacity, dtype=jnp.uint32) < count_ones(words)
        indices = jnp.where(sent, positions(words, capacity), 0)
        return {
            "passed": passed[None],
            "indices": fields.pack(indices, bits_for(x.size)),
            "values": jnp.where(sent, flat[indices], jnp.zeros((), x.dtype)),
        }

    def follow(self, x: Array, positions: Message) -> Message:
        """The message of x in which only those slots carry values that the other one has filled."""
        message, passed = super().follow(x, positions), positions["passed"][0]
        filled = jnp.where(passed <= self.count(x.size), passed, self.kept(x.size))
        sent = jnp.arange(self.count(x.size), dtype=jnp.uint32) < filled
        values = jnp.where(sent, message["values"], jnp.zeros((), x.dtype))
        return {**message, "values": values}

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        indices = fields.unpack(message["indices"], bits_for(size), self.count(size))
        return indices, message["values"]

    def support(self, x: Array, message: Message) -> Array:
        indices, values = self.parts(message, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jnp.zeros(x.size, bool).at[indices].max(values != 0).reshape(x.shape)

    def overflow(self, message: Message) -> Array:
        """How many values passed but did not fit, a uint32 scalar."""
        return message["passed"][0] - jnp.sum(message["values"] != 0, dtype=jnp.uint32)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return 32 + self.count(size) * (bits_of(dtype) + bits_for(size))


def _passing(flat: Array, border: Array) -> Array:
    """How many magnitudes reach the border."""
    return count_ones(at_least(flat)(border))


def _largest(flat: Array, k: int) -> Array:
    """Packed mask of the k largest magnitudes; ties go to the lowest index."""
    mask, zero = at_least(flat), magnitude_order(flat[0]) & 0
    high = zero + jnp.asarray(jnp.iinfo(zero.dtype).max)
    border, _, _ = search(mask, k, k, flat.size, zero, high)
    return cut(mask(border), mask(border + 1), k, k)
