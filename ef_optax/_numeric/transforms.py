"""Orthonormal transforms that spread a vector's energy evenly, and Kashin's representation.

Each transform is a forward map from a flat leaf of size d to a vector of length D >= d, and its
inverse. All randomness comes from one key, so a receiver that knows the key can invert it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.norms import leaf_norm, power_of_two
from ef_optax._numeric.random import random_words


def next_power_of_two(size: int) -> int:
    """The least power of two at or above ``size``; 1 for an empty leaf.

    >>> [next_power_of_two(n) for n in (0, 1, 5, 8)]
    [1, 1, 8, 8]
    """
    return 1 << max(0, size - 1).bit_length()


def hadamard(x: Array) -> Array:
    """The orthonormal Walsh-Hadamard transform of a vector whose length is a power of two.

    It is its own inverse, and takes log2(D) passes of sums and differences.

    >>> hadamard(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    size = x.size
    half = 1
    while half < size:
        pairs = x.reshape(-1, 2, half)
        x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return x * jnp.asarray(1 / math.sqrt(size), x.dtype)


def random_signs(key: Array, size: int, dtype: jax.typing.DTypeLike) -> Array:
    """+1 and -1 with equal probability."""
    plus = random_words(key, (size,)) >> 31 == 0
    return jnp.where(plus, jnp.ones((), dtype), -jnp.ones((), dtype))


def hadamard_length(size: int) -> int:
    """Length of the rotated vector."""
    return next_power_of_two(size)


def hadamard_forward(x: Array, key: Array) -> Array:
    """Pads x with zeros, multiplies it by random signs, and takes the Hadamard transform."""
    padded = jnp.pad(x, (0, hadamard_length(x.size) - x.size))
    return hadamard(padded * random_signs(key, padded.size, x.dtype))


def hadamard_inverse(y: Array, key: Array, size: int) -> Array:
    """The inverse of :func:`hadamard_forward`, for a leaf of ``size``."""
    return (hadamard(y) * random_signs(key, y.size, y.dtype))[:size]


def dft_length(size: int) -> int:
    """The size, padded to be even."""
    return max(2, size + size % 2)


def _phases(key: Array, count: int) -> Array:
    angle = 2 * math.pi * jax.random.uniform(key, (count,), jnp.float32)
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def dft_forward(x: Array, key: Array) -> Array:
    """Makes the halves a complex vector, turns its phases at random, and takes the unitary DFT."""
    half = dft_length(x.size) // 2
    parts = jnp.pad(x.astype(jnp.float32), (0, 2 * half - x.size)).reshape(2, half)
    turned = jnp.fft.fft(jax.lax.complex(parts[0], parts[1]) * _phases(key, half), norm="ortho")
    return jnp.concatenate([turned.real, turned.imag])


def dft_inverse(y: Array, key: Array, size: int) -> Array:
    """The inverse of :func:`dft_forward`, for a leaf of ``size``."""
    parts = y.reshape(2, -1)
    turned = jnp.fft.ifft(jax.lax.complex(parts[0], parts[1]), norm="ortho")
    turned = turned * jnp.conj(_phases(key, parts.shape[1]))
    return jnp.concatenate([turned.real, turned.imag])[:size]


KASHIN_ROUNDS = 3
KASHIN_SHRINK = 0.9
KASHIN_FILL = 0.85


def kashin_length(size: int) -> int:
    """The next power of two, or twice that if too little of it would be padding."""
    length = next_power_of_two(size)
    return 2 * length if size > KASHIN_FILL * length else length


def kashin_forward(x: Array, key: Array) -> Array:
    """Coefficients of x in a frame of D > d vectors, which are flatter than after any rotation.

    Each of three rounds transforms what is not yet represented, clips it at a falling level, and
    adds it to the coefficients. The last round does not clip, so the representation is exact.
    """
    length, size = kashin_length(x.size), x.size
    signs = random_signs(key, size, x.dtype)

    def analyse(v: Array) -> Array:
        return hadamard(jnp.pad(v * signs, (0, length - size)))

    scale = power_of_two(leaf_norm(x, "linf"))
    level = scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)) / max(1, size))
    coefficients, rest = jnp.zeros(length, x.dtype), x
    for _ in range(KASHIN_ROUNDS - 1):
        part = jnp.clip(analyse(rest), -level, level)
        coefficients = coefficients + part
        rest = rest - hadamard(part)[:size] * signs
        level = level * jnp.asarray(KASHIN_SHRINK, x.dtype)
    return coefficients + analyse(rest)


def kashin_inverse(y: Array, key: Array, size: int) -> Array:
    """The vector that has these coefficients."""
    return hadamard(y)[:size] * random_signs(key, size, y.dtype)


TRANSFORMS = {
    "hadamard": (hadamard_length, hadamard_forward, hadamard_inverse),
    "dft": (dft_length, dft_forward, dft_inverse),
    "kashin": (kashin_length, kashin_forward, kashin_inverse),
}
