"""Sign compressors: one bit a value and, at most, one scale a leaf."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _fields, _kernels
from ef_optax._base import Array, Codec, Message, Shape, bits_of, size_of, wide_dtype
from ef_optax._compressor import Compressor


def scale_dtype(dtype: Any) -> Any:
    """A scale travels as float32, or as wide as the leaf where that is wider."""
    return wide_dtype(dtype)


class SignCodec(Codec):
    """``C(x) = scale(x) * sign(x)`` with sign(0) = +1; subclasses give the scale.

    A leaf that is exactly zero has scale 0 and stays exactly zero.
    """

    streams: ClassVar[bool] = True

    @abc.abstractmethod
    def scale(self, x: Array) -> Array:
        """The magnitude that all entries get, a scalar."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return {
            "signs": _fields.pack_signs(x.reshape(-1)),
            "scale": self.scale(x).astype(scale_dtype(x.dtype))[None],
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        signs = _fields.unpack_signs(message["signs"], size_of(like.shape), like.dtype)
        return (signs * message["scale"].astype(like.dtype)).reshape(like.shape)

    def residual(self, x: Array, message: Message) -> Array:
        """From the signs of x itself: equal to decoding, without unpacking."""
        scale = message["scale"].astype(x.dtype)[0]
        return x - jnp.where(x >= 0, scale, -scale)

    def finite(self, x: Array, message: Message) -> Array:
        """Told by the scale: a NaN or inf anywhere makes a norm of the leaf NaN or inf.

        False too if the norm of finite numbers has overflowed: what is decoded would be infinite.
        """
        del x
        return jnp.all(jnp.isfinite(message["scale"]))

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) + bits_of(scale_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Sign(SignCodec):
    """``C(x) = sign(x)``, sign(0) = +1, the zero leaf excepted."""

    homogeneous: ClassVar[bool] = False

    def scale(self, x: Array) -> Array:
        return jnp.any(x != 0)

    def finite(self, x: Array, message: Message) -> Array:
        """The scale is 0 or 1 and tells nothing."""
        return Codec.finite(self, x, message)


@dataclasses.dataclass(frozen=True)
class ScaledSign(SignCodec):
    """``C(x) = (||x||_1 / d) sign(x)``, sign(0) = +1."""

    basis: ClassVar[str] = "exact"

    def scale(self, x: Array) -> Array:
        return jnp.sum(jnp.abs(x), dtype=scale_dtype(x.dtype)) / max(1, x.size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        """Signs and scale from one reading of x."""
        del key
        words, norm = _kernels.pack_signs_and_norm(x.reshape(-1))
        signs = _fields.Packed(words, x.size)
        return {"signs": signs, "scale": (norm / max(1, x.size))[None]}

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/d, the worst case over x; at x it is ``||x||_1^2 / (d ||x||_2^2)``, exactly."""
        del num_workers
        return 1.0 / max(1, size_of(shape))


def sign() -> Compressor:
    """The bare signs: ``C(x) = sign(x)`` with sign(0) = +1, and 0 for a leaf that is all zero.

    Not homogeneous and not contractive: without a scale the message forgets the magnitude. The step
    is ``lr`` in every coordinate. Under error feedback use :func:`ef_optax.scaled_sign`.

    Returns:
      The compressor. Bits: d + 32 (one word says whether the leaf is zero).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.sign().update(jnp.array([3.0, -1.0, 0.0]), ef.sign().init(None))[0].tolist()
      [1.0, -1.0, 1.0]

    References:
      Bernstein, Wang, Azizzadenesheli, Anandkumar, signSGD, 2018.
    """
    return Compressor(Sign())


def scaled_sign() -> Compressor:
    """Signs times the mean magnitude: ``C(x) = (||x||_1 / d) sign(x)``, sign(0) = +1, per leaf.

    alpha(x) = ``||x||_1^2 / (d ||x||_2^2)`` in [1/d, 1] (exact); ``alpha`` returns the worst case.

    Returns:
      The compressor. Bits: d + 32 (a float32 scale); 32 signs travel in a word.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.scaled_sign()
      >>> compressor.update(jnp.array([3.0, -1, 2, 1]), compressor.init(None))[0].tolist()
      [1.75, -1.75, 1.75, 1.75]

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error feedback fixes SignSGD, 2019, Algorithm 1.
    """
    return Compressor(ScaledSign())
