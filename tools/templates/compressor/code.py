"""New name: what it sends of a leaf, in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class NewName(Codec):
    """``C(x) = step clip(round(x / step), -127, 127)``."""

    step: float

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False)  # fixed levels

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        return {"codes": jnp.clip(jnp.round(x / self.step), -127, 127).astype(jnp.int8)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return (message["codes"].astype(like.dtype) * self.step).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 8 * size_of(shape)


def new_name(step: float) -> Compressor:
    """What it does, in one line: ``C(x) = step clip(round(x / step), -127, 127)``.

    Whether it is biased, and its alpha or omega if they are known.

    Args:
      step: the distance between two values that can be sent, > 0.

    Returns:
      The compressor. Bits: 8 d.

    Raises:
      ValueError: for a step that is not positive. TypeError: for a step that is not a number.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.new_name(0.5)
      >>> compressor.update(jnp.array([0.3, -1.6, 0.0]), compressor.init(None))[0].tolist()
      [0.5, -1.5, 0.0]

    References:
      Authors, Title, year, equation.
    """
    check.positive("new_name", "step", step)
    return Compressor(NewName(float(step)))
