"""Random subsets that a receiver can draw again from one 32-bit seed.

A keyed permutation of ``0..size-1`` is evaluated at ``0..k-1``. This gives k distinct indices in
O(k) work and memory; shuffling or sorting would take O(size). The permutation is a Feistel network
on the next power of two, applied again and again until the index is below ``size``. A random offset
is then added, so that every index is chosen with probability k/size.

The functions that draw are traced once for each shape, wherever they are called: encoder, decoder
and all other leaves of that shape share the trace.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import bits_for

_ROUNDS = 6


GOLDEN = 0x9E3779B9


@jax.jit
def mix32(x: jax.Array) -> jax.Array:
    """A bijective hash of 32-bit words (the finaliser of MurmurHash3).

    Args:
      x: uint32 of any shape.

    Returns:
      uint32 of the same shape; flipping one bit of ``x`` flips each bit with probability near 1/2.
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnames=("size", "k"))
def random_subset(seed: jax.Array, size: int, k: int) -> jax.Array:
    """K distinct indices out of ``size``, each with probability k/size, drawn from ``seed``.

    Args:
      seed: uint32 scalar.
      size: static number of candidates d.
      k: static number of indices, 0 <= k <= size.

    Returns:
      uint32 of shape (k,), in random order.

    Example:
      >>> import jax.numpy as jnp
      >>> sorted(random_subset(jnp.uint32(7), 4, 4).tolist())
      [0, 1, 2, 3]
    """
    bits = bits_for(size)
    start = jnp.arange(k, dtype=jnp.uint32) ^ (seed & jnp.uint32(0))  # typed like the seed
    if bits == 0 or k == 0:
        return start
    limit = jnp.uint32(size)

    def walk(indices: jax.Array) -> jax.Array:
        return jnp.where(indices < limit, indices, _permute(indices, seed, bits))

    first = _permute(start, seed, bits)
    landed = jax.lax.while_loop(lambda i: jnp.any(i >= limit), walk, first)
    offset = mix32(seed ^ jnp.uint32(GOLDEN)) % limit
    # landed + offset overflows only for sizes above 2**31, which no leaf has here
    return (landed + offset) % limit


def _permute(x: jax.Array, seed: jax.Array, bits: int) -> jax.Array:
    """A permutation of ``0..2**bits - 1``: a Feistel network with halves of nearly equal width."""
    low_bits = bits - bits // 2
    high_bits = bits - low_bits
    high, low = x >> low_bits, x & jnp.uint32((1 << low_bits) - 1)
    for i in range(_ROUNDS):  # an even number, so that the halves end with their first widths
        target_bits = high_bits if i % 2 == 0 else low_bits
        round_key = mix32(seed + jnp.uint32((i + 1) * GOLDEN & 0xFFFFFFFF))
        mask = jnp.uint32((1 << target_bits) - 1)
        high, low = low, high ^ (mix32(low ^ round_key) & mask)
    return (high << low_bits) | low


def is_key(x: Any) -> TypeGuard[Array]:
    """Whether this is an array of typed random keys.

    >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0))
    (True, False)
    """
    return isinstance(x, jax.Array) and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def as_key(key: Any, name: str) -> Array:
    """Accepts an int, a typed key or a raw ``uint32[2]`` key; returns a typed key.

    Raises:
      TypeError: for anything else, None and an array of keys included; the message names the
        caller and the remedy.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        return jax.random.key(key)
    if is_key(key) and key.shape:
        raise TypeError(
            f"{name}: key has shape {key.shape}, but one key is needed, such as key[0]; it differs "
            "between steps, leaves and workers by itself."
        )
    if is_key(key):
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "shape", None) == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(f"{name}: key={key!r} is not a random key; pass jax.random.key(0) or an int.")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["sizes", "row"]
)
@dataclasses.dataclass(frozen=True)
class PartKeys:
    """A key for each of several parts that follow each other in one vector.

    What is drawn for the vector with it is what is drawn for each part alone with its own key.

    Attributes:
      keys: typed keys of shape (parts,).
      sizes: the number of values of each part.
      row: a divisor of all sizes; values are drawn in rows of this length.
    """

    keys: Array
    sizes: tuple[int, ...]
    row: int

    def words(self) -> Array:
        """The words of :func:`random_words`, for all parts in one program."""
        seeds = jax.vmap(_seeds)(self.keys)
        stretch = math.gcd(*self.sizes)  # no stretch of this length crosses a border
        counts = [size // stretch for size in self.sizes]
        part = np.repeat(np.arange(len(counts)), counts)
        begins = np.repeat(list(itertools.accumulate(counts, initial=0))[:-1], counts)
        first = (np.arange(len(part)) - begins).astype(np.uint32) * np.uint32(stretch)

        def of_rows(x: Array) -> Array:
            """One value for each row, from one for each stretch."""
            return jnp.repeat(x, stretch // self.row)[:, None]

        inside = np.arange(stretch // self.row, dtype=np.uint32) * np.uint32(self.row)
        starts = (jnp.asarray(first)[:, None] + inside).reshape(-1, 1)
        counter = starts + jax.lax.iota(jnp.uint32, self.row)
        return _words(counter, *(of_rows(seeds[part, i]) for i in range(2))).reshape(-1)


def _seeds(key: Array) -> Array:
    return jax.random.bits(key, (2,), jnp.uint32)


def _words(counter: Array, first: Array, second: Array) -> Array:
    return mix32(mix32(counter + first) ^ second)


@functools.partial(jax.jit, static_argnames="shape")
def random_words(key: Array | PartKeys, shape: tuple[int, ...]) -> Array:
    """uint32 words, uniform and independent for all practical purposes, by hashing a counter."""
    if isinstance(key, PartKeys):
        return key.words().reshape(shape)
    seeds = _seeds(key)
    counter = jax.lax.iota(jnp.uint32, math.prod(shape))
    return _words(counter, seeds[0], seeds[1]).reshape(shape)


def uniform_noise(key: Array | PartKeys, shape: tuple[int, ...]) -> Array:
    """float32 numbers in [0, 1), multiples of 2^-24."""
    return (random_words(key, shape) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


@jax.jit
def round_randomly(y: Array, key: Array | PartKeys) -> Array:
    """Rounds at random to a neighbouring integer, so that the expectation is y; integers stay.

    Args:
      y: floating array.
      key: this step's key.

    Returns:
      Integers in the dtype of ``y``.
    """
    low = jnp.floor(y)
    up = uniform_noise(key, y.shape).astype(y.dtype) < y - low
    return low + up.astype(y.dtype)
