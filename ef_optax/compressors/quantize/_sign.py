"""Codecs that send one bit per entry and one scale."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.shapes import Shape, size_of


class SignCodec(Codec):
    """``C(x) = scale(x) * sign(x)`` with sign(0) = +1; subclasses define the scale.

    A leaf that is exactly zero has scale 0 and stays exactly zero.
    """

    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        return Traits(streams=True)

    @abc.abstractmethod
    def scale(self, x: Array) -> Array:
        """The magnitude of all decoded entries, a scalar."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return {
            "signs": fields.pack_signs(x.reshape(-1)),
            "scale": self.scale(x).astype(scale_dtype(x.dtype))[None],
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        signs = fields.unpack_signs(message["signs"], size_of(like.shape), like.dtype)
        return (signs * message["scale"].astype(like.dtype)).reshape(like.shape)

    def residual(self, x: Array, message: Message) -> Array:
        """The same as decoding, but from the signs of x, so that nothing is unpacked."""
        scale = message["scale"].astype(x.dtype)[0]
        return x - jnp.where(x >= 0, scale, -scale)

    def finite(self, x: Array, message: Message) -> Array:
        """Checks only the scale: a NaN or inf anywhere makes a norm of the leaf NaN or inf.

        The result is also false if the norm of finite numbers overflows, because the decoded values
        are infinite then.
        """
        del x
        return jnp.all(jnp.isfinite(message["scale"]))

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) + bits_of(scale_dtype(dtype))
