"""Codecs with three levels and one scale."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._bits.quartic import pack_quartic, quartic_bits, unpack_quartic
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.shapes import Shape, size_of

PACKINGS = ("bits", "quartic")


class TernaryCodec(Codec):
    """``C(x) = scale * t`` with t in {-1, 0, 1}; subclasses define scale and t."""

    packing: str

    @abc.abstractmethod
    def parts(self, x: Array, key: Array | None) -> tuple[Array, Array]:
        """The scale (a scalar) and the ternary values of a flat leaf."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        return self._message(*self.parts(x.reshape(-1).astype(scale_dtype(x.dtype)), key))

    def _message(self, scale: Array, ternary: Array) -> Message:
        if self.packing == "quartic":
            packed = pack_quartic(ternary)
        else:
            packed = fields.pack(ternary.astype(jnp.int32) + 1, 2)
        return {"ternary": packed, "scale": scale[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        size = size_of(like.shape)
        if self.packing == "quartic":
            ternary = unpack_quartic(message["ternary"], size)
        else:
            ternary = fields.unpack(message["ternary"], 2, size).astype(jnp.int32) - 1
        values = ternary.astype(message["scale"].dtype) * message["scale"]
        return values.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        values = quartic_bits(size) if self.packing == "quartic" else 2 * size
        return values + bits_of(scale_dtype(dtype))
