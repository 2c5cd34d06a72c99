"""The scaled sign: one bit per entry, times the mean magnitude."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp

from ef_optax import _kernels
from ef_optax._bits import fields
from ef_optax._bits.packing import WORD_BITS
from ef_optax._core.joinable import Joinable, JointCodec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._exchange.stack import STACK_LIMIT
from ef_optax._numeric.dtypes import Array, scale_dtype
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._sign import SignCodec
from ef_optax.compressors.quantize._sign_rows import SignRows
from ef_optax.compressors.quantize._sign_words import SignWords


@dataclasses.dataclass(frozen=True)
class ScaledSign(SignCodec, Joinable):
    """``C(x) = (||x||_1 / d) sign(x)``, sign(0) = +1."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, basis="exact")

    def scale(self, x: Array) -> Array:
        return jnp.sum(jnp.abs(x), dtype=scale_dtype(x.dtype)) / float(max(1, x.size))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        """The signs and the scale, from one pass over x."""
        del key
        words, norm = _kernels.pack_signs_and_norm(x.reshape(-1))
        signs = fields.Packed(words, x.size)
        return {"signs": signs, "scale": (norm / float(max(1, x.size)))[None]}

    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """Leaves of whole words; other small ones by the power of two to which they are rounded."""
        size = size_of(like.shape)
        if not size:
            return None
        if size % WORD_BITS == 0:
            return "words"
        return (size - 1).bit_length() if size <= STACK_LIMIT else None

    def joint(self, like: jax.ShapeDtypeStruct) -> JointCodec:
        return SignRows(self) if size_of(like.shape) % WORD_BITS else SignWords(self)

    def copied(self, like: jax.ShapeDtypeStruct) -> bool:
        return size_of(like.shape) % WORD_BITS == 0

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """1/d, the worst case over x; for a given x it is ``||x||_1^2 / (d ||x||_2^2)``."""
        del num_workers
        return 1.0 / max(1, size_of(shape))


def scaled_sign() -> Compressor:
    """Signs times the mean magnitude: ``C(x) = (||x||_1 / d) sign(x)``, sign(0) = +1, per leaf.

    For a given x, alpha = ``||x||_1^2 / (d ||x||_2^2)`` in [1/d, 1] (exact); ``codec.alpha``
    returns the worst case.

    Returns:
      The compressor. Bits: d + 32, for the signs and a float32 scale; a word holds 32 signs.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.scaled_sign()
      >>> compressor.update(jnp.array([3.0, -1, 2, 1]), compressor.init(None))[0].tolist()
      [1.75, -1.75, 1.75, 1.75]

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error feedback fixes SignSGD, 2019, Algorithm 1.
    """
    return Compressor(ScaledSign())
