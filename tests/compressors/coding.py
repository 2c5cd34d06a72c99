"""One input through a codec, by one compiled program: eagerly, each operation would be compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ef_optax as ef


def coded(compressor: ef.Compressor, x: Any, key: Any = None, dtype: str = "float32") -> tuple:
    """The message, C(x) and the residual of one input."""
    x, codec = np.asarray(x).astype(jnp.dtype(dtype)), compressor.codec
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)

    @jax.jit
    def run(x, key):
        message = codec.encode(x, key)
        return message, codec.decode(message, like), codec.residual(x, message)

    message, y, residual = jax.device_get(run(x, key))
    assert y.dtype == x.dtype and y.shape == x.shape
    return message, y, residual


def decoded(
    compressor: ef.Compressor, x: Any, key: Any = None, dtype: str = "float32"
) -> np.ndarray:
    """C(x)."""
    return coded(compressor, x, key, dtype)[1]


def updated(compressor: ef.Compressor, x: Any, state: Any) -> tuple[Any, Any]:
    """One update of the compressor on its own: what it sends, and its next state."""
    return jax.jit(compressor.update)(x, state)


@dataclasses.dataclass(frozen=True)
class Keyed(ef.extend.Codec):
    """Sends nothing but its key."""

    key: jax.Array

    @property
    def traits(self) -> ef.extend.Traits:
        return ef.extend.Traits(deterministic=False)

    def encode(self, x, key=None):
        return jax.random.key_data(key)

    def decode(self, message, like):
        return jnp.full(like.shape, (message[-1] >> 8).astype(like.dtype))

    def bits(self, shape, dtype=jnp.float32):
        return 64
