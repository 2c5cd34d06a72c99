"""The compressor that changes nothing: the dense baseline and the neutral element."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._core.transport import AllReduce, Transport
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """``C(x) = x``, exchanged as an all-reduce of the values."""

    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, linear=True, basis="exact")

    @property
    def transport(self) -> Transport:
        return AllReduce()

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return x

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype)

    def residual(self, x: Array, message: Message) -> Array:
        del message
        return jnp.zeros_like(x)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        del shape, num_workers
        return 1.0

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        del shape, num_workers
        return 0.0


def identity() -> Compressor:
    """Sends everything: ``C(x) = x`` by an all-reduce. alpha = 1, omega = 0 (exact).

    Returns:
      The compressor; its message is the dense array (32 bits a value for float32).

    Example:
      >>> import ef_optax as ef
      >>> ef.identity().bits((1000,))
      32000
    """
    return Compressor(Identity())
