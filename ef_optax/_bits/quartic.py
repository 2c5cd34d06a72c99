"""Five values of {-1, 0, 1} in a byte: 3^5 = 243 of its 256 codes, 1.6 bits per value."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._numeric.dtypes import Array

_POWERS = np.asarray([81, 27, 9, 3, 1], np.int32)


def quartic_bits(size: int) -> int:
    """Bits of ``size`` ternary values: 8 for every five.

    >>> quartic_bits(11)
    24
    """
    return 8 * math.ceil(size / 5)


def quartic_bytes(ternary: Array) -> Array:
    """The bytes, 0..242, of a vector of {-1, 0, 1}; the last five values are padded with zeros.

    >>> quartic_bytes(jnp.array([0, 0, 0, 0, 0, 1])).tolist()
    [121, 202]
    """
    digits = jnp.pad(ternary.astype(jnp.int32) + 1, (0, -ternary.size % 5), constant_values=1)
    return jnp.sum(digits.reshape(-1, 5) * _POWERS, axis=1)


def pack_quartic(ternary: Array) -> fields.Packed:
    """Packs a vector of {-1, 0, 1}, five values per byte."""
    return fields.pack(quartic_bytes(ternary), 8)


def unpack_quartic(field: fields.Packed, count: int) -> Array:
    """The inverse of :func:`pack_quartic`: int32 values of {-1, 0, 1}.

    >>> unpack_quartic(pack_quartic(jnp.array([1, -1, 0, 0, 1, -1])), 6).tolist()
    [1, -1, 0, 0, 1, -1]
    """
    packed = fields.unpack(field, 8, math.ceil(count / 5)).astype(jnp.int32)
    return (packed[:, None] // _POWERS % 3 - 1).reshape(-1)[:count]
