"""The plain sign: one bit per entry, and one word that keeps a leaf of zeros zero."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._sign import SignCodec


@dataclasses.dataclass(frozen=True)
class Sign(SignCodec):
    """``C(x) = sign(x)`` with sign(0) = +1, except for a leaf of zeros."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, homogeneous=False)

    def scale(self, x: Array) -> Array:
        return jnp.any(x != 0)

    def finite(self, x: Array, message: Message) -> Array:
        """Checks the leaf, since the scale is always 0 or 1."""
        return Codec.finite(self, x, message)


def sign() -> Compressor:
    """Signs without a scale: ``C(x) = sign(x)`` with sign(0) = +1, and 0 for a leaf of zeros.

    It is neither homogeneous nor contractive, because the message does not carry the magnitude. The
    step is ``lr`` in every coordinate. Under error feedback use :func:`ef_optax.scaled_sign`:
    here the residual of a small x is x - 1 or x + 1, whose rounding error is up to 6e-8 in float32,
    however small x is.

    Returns:
      The compressor. Bits: d + 32, of which one word shows whether the leaf is zero.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.sign().update(jnp.array([3.0, -1.0, 0.0]), ef.sign().init(None))[0].tolist()
      [1.0, -1.0, 1.0]

    References:
      Bernstein, Wang, Azizzadenesheli, Anandkumar, signSGD, 2018.
    """
    return Compressor(Sign())
