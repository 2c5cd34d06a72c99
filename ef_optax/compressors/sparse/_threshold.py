"""Sparsifiers by a threshold: how many values pass depends on the data, the message does not.

A message has a fixed capacity c. If fewer values pass, the free slots carry zeros; if more pass,
the c largest are sent and the others stay in the residual, counted, never dropped.
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
    """Values whose magnitude reaches a border; subclasses say which, and how many have room.

    Borders are integers in the order of `_numeric.magnitude.magnitude_order`.
    """

    @abc.abstractmethod
    def border(self, flat: Array) -> Array:
        """What a magnitude must reach to be sent."""

    def kept(self, size: int) -> int:
        """How many values are sent, the largest, where more pass than there is room for."""
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
        room = passed <= capacity
        words = jax.lax.cond(room, lambda: words, lambda: _largest(flat, self.kept(x.size)))
        sent = jnp.arange(capacity, dtype=jnp.uint32) < count_ones(words)
        indices = jnp.where(sent, positions(words, capacity), 0)
        return {
            "passed": passed[None],
            "indices": fields.pack(indices, bits_for(x.size)),
            "values": jnp.where(sent, flat[indices], jnp.zeros((), x.dtype)),
        }

    def follow(self, x: Array, places: Message) -> Message:
        """Only the slots that the other message has filled carry values."""
        message, passed = super().follow(x, places), places["passed"][0]
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
        """How many values passed and found no room, a uint32 scalar."""
        return message["passed"][0] - jnp.sum(message["values"] != 0, dtype=jnp.uint32)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return 32 + self.count(size) * (bits_of(dtype) + bits_for(size))


def _passing(flat: Array, border: Array) -> Array:
    """How many magnitudes reach the border."""
    return count_ones(at_least(flat)(border))


def _largest(flat: Array, k: int) -> Array:
    """Mask of the k largest magnitudes, packed; ties to the lowest index."""
    mask, zero = at_least(flat), magnitude_order(flat[0]) & 0
    high = zero + jnp.asarray(jnp.iinfo(zero.dtype).max)
    border, _, _ = search(mask, k, k, flat.size, zero, high)
    return cut(mask(border), mask(border + 1), k, k)
