"""Adaptive quantisation: the largest values of either sign, replaced by their mean."""

from __future__ import annotations

import dataclasses
import fractions
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import scatter

UNUSED, PLUS, MINUS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Adaq(Codec):
    """The same share of the positive and of the negative values, each sent as their mean."""

    ratio: float

    def capacity(self, size: int) -> int:
        """Slots of the message: one more than the ratio's k, since both shares are rounded up."""
        return min(size, resolve_k(self.ratio, None, size) + 1) if size else 0

    def _share(self, count: Array) -> Array:
        """ceil(ratio count), exactly, in 32-bit integers."""
        p, q = fractions.Fraction(str(self.ratio)).as_integer_ratio()
        whole, rest = count // q, count % q
        return whole * p + (rest * p + q - 1) // q

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1).astype(wide_dtype(x.dtype))
        slots = self.capacity(flat.size)
        positions, means, kept = [], [], []
        for side in (flat, -flat):
            values, indices = jax.lax.top_k(jnp.maximum(side, 0), slots)
            share = self._share(jnp.sum(side > 0, dtype=jnp.int32))
            sent = jnp.arange(slots) < share
            total = jnp.sum(jnp.where(sent, values, 0))
            means.append(total / jnp.maximum(share, 1).astype(flat.dtype))
            positions.append(indices)
            kept.append(share)
        # The slots of the positive values come first, then those of the negative ones.
        slot = jnp.arange(slots)
        plus, used = slot < kept[0], slot < kept[0] + kept[1]
        other = jnp.take(positions[1], jnp.maximum(slot - kept[0], 0), mode="clip")
        codes = jnp.where(plus, PLUS, jnp.where(used, MINUS, UNUSED))
        return {
            "indices": fields.pack(jnp.where(plus, positions[0], other), bits_for(flat.size)),
            "codes": fields.pack(codes, 2),
            "means": jnp.stack(means),
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        size = size_of(like.shape)
        slots = self.capacity(size)
        indices = fields.unpack(message["indices"], bits_for(size), slots)
        codes = fields.unpack(message["codes"], 2, slots)
        plus, minus = message["means"]
        zero = jnp.zeros((), plus.dtype)
        values = jnp.where(codes == PLUS, plus, jnp.where(codes == MINUS, -minus, zero))
        return scatter(values, indices, like)

    def support(self, x: Array, message: Message) -> Array:
        return self.decode(message, jax.ShapeDtypeStruct(x.shape, x.dtype)) != 0

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        fields = self.capacity(size) * (bits_for(size) + 2)
        return fields + 2 * bits_of(wide_dtype(dtype))


def adaq(ratio: float) -> Compressor:
    """Adaptive quantisation: the largest values of either sign, each sent as their mean.

    The ceil(ratio d+) largest of the d+ positive values are decoded as their mean. The
    ceil(ratio d-) largest magnitudes of the d- negative values are decoded as their mean. All
    others are decoded as 0. The published method finds the two thresholds by sampling; here they
    are exact. No contraction constant is known.

    Args:
      ratio: share of each sign that is sent, in (0, 1].

    Returns:
      The compressor. Bits: 64 + c (2 + ceil(log2 d)), c = min(d, ceil(ratio d) + 1).

    Raises:
      ValueError: for a bad ``ratio``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor = ef.adaq(0.5)
      >>> x = jnp.array([1.0, 4.0, 6.0, 2.0, -5.0, -1.0])
      >>> jax.jit(compressor.update)(x, compressor.init(x))[0].tolist()
      [0.0, 5.0, 5.0, 0.0, -5.0, 0.0]

    References:
      Dryden, Moon, Jacobs, Van Essen, Communication quantization for data-parallel training of
      deep neural networks, 2016, section 3.
    """
    check.ratio("adaq", "ratio", ratio)
    return Compressor(Adaq(float(ratio)))
