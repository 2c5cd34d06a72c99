"""INCEPTIONN: smaller values get fewer bits, down to none, within an absolute error.

The length of the published message depends on the data. Here the payload has a fixed capacity.
Values that do not fit, which are the smallest ones, stay in the residual and are counted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor

BYTES = (0, 1, 2, 4)
"""Bytes of payload for each tag: not sent, 8 bits, 16 bits, or the float32 itself."""


@dataclasses.dataclass(frozen=True)
class Inceptionn(Codec):
    """Two-bit tags of all values, then the payloads: first 32-bit, then 16-bit, then 8-bit ones."""

    exponent: int  # the error bound is 2^-exponent
    capacity: float

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False)

    def room(self, size: int) -> int:
        """Bytes of payload in the message of a leaf of ``size``."""
        return resolve_k(self.capacity, None, 4 * size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1).astype(jnp.float32)
        wanted = self.tags(flat)
        bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
        served = largest_that_fit(bits & 0x7FFFFFFF, jnp.asarray(BYTES)[wanted], self.room(x.size))
        tags = jnp.where(served, wanted, 0)
        codes = jnp.where(tags == 3, bits, fixed_point(flat, *self._point(tags)))
        starts, lengths = self._starts(tags), jnp.asarray(BYTES)[tags]
        payload = jnp.zeros(self.room(flat.size), jnp.uint8)
        for byte in range(4):
            value = (codes >> (8 * byte)).astype(jnp.uint8)
            at = jnp.where(byte < lengths, starts + byte, payload.size)
            payload = payload.at[at].set(value, mode="drop")
        full = jnp.sum(jnp.asarray(BYTES)[wanted], dtype=jnp.uint32)
        return {
            "wanted": full[None],
            "tags": fields.pack(tags, 2),
            "payload": payload,
        }

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        tags = fields.unpack(message["tags"], 2, size_of(like.shape)).astype(jnp.int32)
        starts, lengths = self._starts(tags), jnp.asarray(BYTES)[tags]
        codes = jnp.zeros(tags.shape, jnp.uint32)
        for byte in range(4):
            value = jnp.take(message["payload"], starts + byte, mode="fill", fill_value=0)
            value = jnp.where(byte < lengths, value.astype(jnp.uint32), 0)
            codes = codes | (value << (8 * byte))
        whole = jax.lax.bitcast_convert_type(codes, jnp.float32)
        part = from_fixed_point(codes, *self._point(tags))
        values = jnp.where(tags == 3, whole, jnp.where(tags == 0, 0.0, part))
        return values.astype(like.dtype).reshape(like.shape)

    def tags(self, flat: Array) -> Array:
        """The tag of each value, by its exponent: 3 from 1 up, then 2 and 1; 0 below the bound."""
        # The exponent of the leading bit; -127 for zero and denormal numbers.
        exponent = ((jax.lax.bitcast_convert_type(flat, jnp.int32) >> 23) & 255) - 127
        limits = (-self.exponent, -self._middle, 0)
        passed = jnp.stack([exponent >= limit for limit in limits])
        return jnp.sum(passed, axis=0, dtype=jnp.int32)

    @property
    def _middle(self) -> int:
        """Values below 2^-middle take 8 bits; they are half of the binades from the bound to 1."""
        return self.exponent // 2

    def _point(self, tags: Array) -> tuple[Array, Array]:
        """Digits after the binary point, and bits of the magnitude, for each value."""
        return jnp.where(tags == 2, 15, self._middle + 7), jnp.where(tags == 2, 15, 7)

    @staticmethod
    def _starts(tags: Array) -> Array:
        """Where each payload begins: the longer kinds first, each kind in the order of the leaf."""
        starts, start = jnp.zeros(tags.shape, jnp.int32), jnp.zeros((), jnp.int32)
        for tag in (3, 2, 1):
            members = (tags == tag).astype(jnp.int32)
            rank = jnp.cumsum(members) - members
            starts = jnp.where(tags == tag, start + BYTES[tag] * rank, starts)
            start = start + BYTES[tag] * jnp.sum(members)
        return starts

    def support(self, x: Array, message: Message) -> Array:
        return (fields.unpack(message["tags"], 2, x.size) != 0).reshape(x.shape)

    def information(self, message: Message) -> Array:
        """Bits of the published message of this leaf: those of its tags and of all its payload."""
        return jnp.uint32(message["tags"].bits) + 8 * message["wanted"][0]

    def overflow(self, message: Message) -> Array:
        """Bytes of payload that did not fit and stay in the residual, a uint32 scalar."""
        count = message["tags"].bits // 2
        sent = jnp.asarray(BYTES)[fields.unpack(message["tags"], 2, count)]
        return message["wanted"][0] - jnp.sum(sent, dtype=jnp.uint32)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        del dtype
        size = size_of(shape)
        return 32 + 2 * size + 8 * self.room(size)


def largest_that_fit(magnitude: Array, lengths: Array, room: int) -> Array:
    """The largest magnitudes whose lengths add up to at most ``room``; ties go to the first.

    A bisection, with 31 sums over the leaf, finds the least magnitude that fits with all above it.

    >>> largest_that_fit(jnp.array([5, 9, 5, 5, 1]), jnp.array([2, 4, 2, 2, 1]), 9).tolist()
    [True, True, True, False, False]
    """
    magnitude, lengths = magnitude.astype(jnp.uint32), lengths.astype(jnp.uint32)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        fits = jnp.sum(jnp.where(magnitude >= middle, lengths, 0), dtype=jnp.uint32) <= room
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    zero = jnp.sum(magnitude * 0, dtype=jnp.uint32)  # typed like the data, for loops inside maps
    _, least = jax.lax.fori_loop(0, 31, halve, (zero, zero + jnp.uint32(0x7FFFFFFF)))
    above, equal = magnitude >= least, (magnitude == least - 1) & (least > 0)
    used = jnp.sum(jnp.where(above, lengths, 0), dtype=jnp.uint32)
    ends = used + jnp.cumsum(jnp.where(equal, lengths, 0))
    return above | (equal & (ends <= room))


def fixed_point(x: Array, last: Array, width: Array) -> Array:
    """The magnitude in steps of 2^-last, truncated to ``width`` bits, with the sign above them.

    >>> fixed_point(jnp.array([0.75, -0.5]), 7, 7).tolist()
    [96, 192]
    """
    steps = jnp.ldexp(jnp.minimum(jnp.abs(x), 1 - 2.0**-24), last)
    return steps.astype(jnp.uint32) | ((x < 0).astype(jnp.uint32) << width)


def from_fixed_point(codes: Array, last: Array, width: Array) -> Array:
    """The inverse of :func:`fixed_point`."""
    one = jnp.uint32(1)
    magnitude = jnp.ldexp((codes & ((one << width) - one)).astype(jnp.float32), -last)
    return jnp.where((codes >> width) & one == one, -magnitude, magnitude)


def inceptionn(error_bound: float = 2.0**-10, *, capacity: float = 0.25) -> Compressor:
    """INCEPTIONN: each value in 32, 16, 8 or no bits, by its binade, with a tag of 2 bits.

    For the bound 2^-E a value from 1 up is sent as it is; from 2^-floor(E/2) up, as its sign and 15
    bits after the binary point; from 2^-E up, as its sign and the 7 bits that follow the floor(E/2)
    leading zeros it must have; and smaller values are not sent. All are truncated towards zero, so
    ``|C(x) - x| < 2^-E`` for each value. It is an absolute compressor: it has no contraction
    constant and is not homogeneous.

    The length of the published message varies with the data. This message holds a fixed share of
    the dense leaf. If that is too little, the smallest magnitudes are left out, the last of equal
    ones first. They stay in the residual, are counted by ``codec.overflow(message)``, and grow
    under error feedback until they are sent.

    Args:
      error_bound: 2^-E with E from 1 to 14; the published runs use 2^-10, 2^-8 and 2^-6.
      capacity: capacity of the payload as a share of 4 d bytes, in (0, 1].

    Returns:
      The compressor. Bits: 32 + 2 d + 8 ceil(4 capacity d). The first word is the number of bytes
      of payload that the data need; the *information*, 2 d bits and these bytes, is
      ``codec.information(message)``.

    Raises:
      ValueError: for a bad ``error_bound`` or ``capacity``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor = ef.inceptionn(2**-10, capacity=0.5)
      >>> x = jnp.array([1.2345, -0.3, 0.002, 0.0009])
      >>> jax.jit(compressor.update)(x, compressor.init(x))[0].tolist()
      [1.2345000505447388, -0.29998779296875, 0.001953125, 0.0]
      >>> compressor.bits((1000,))
      18032

    References:
      Li et al., A network-centric hardware/algorithm co-design to accelerate distributed training
      of deep neural networks, MICRO 2018, as implemented in the public code of GRACE. There the 7
      bits of small values begin at the binary point, so values below 2^-6 become zero.
    """
    bounds = {2.0**-e: e for e in range(1, 15)}
    if not isinstance(error_bound, float) or error_bound not in bounds:
        raise ValueError(
            f"inceptionn: error_bound={error_bound!r} must be a power of two from 2**-14 to 2**-1."
        )
    check.ratio("inceptionn", "capacity", capacity)
    return Compressor(Inceptionn(bounds[error_bound], float(capacity)))
