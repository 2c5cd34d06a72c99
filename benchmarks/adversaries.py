"""Vectors on which a threshold, a tie rule or a comparison goes wrong, and the right results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def adversaries(size: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Named vectors of one size, float32 or bfloat16."""
    rng = np.random.default_rng(size)
    normal = rng.standard_normal(size)
    special = normal.copy()
    for value, share in ((0.0, 8), (-0.0, 8), (np.inf, 300), (-np.inf, 300)):
        special[rng.permutation(size)[: size // share]] = value
    many = normal.copy()
    many[rng.permutation(size)[: size // 9]] = np.inf
    many[rng.permutation(size)[: size // 9]] = -np.inf
    nan = normal.copy()
    nan[rng.permutation(size)[: size // 7 + 1]] = np.nan
    cases = {
        "normal": normal,
        "equal": np.full(size, -0.35),  # a pattern of bits that is odd
        "zero": np.zeros(size),
        "negative zero": np.full(size, -0.0),
        "rising": np.linspace(-1.0, 3.0, size),
        "falling": np.linspace(5.0, 0.0, size),
        "ties": rng.integers(-2, 3, size) * 0.5,
        "almost all zero": np.where(rng.random(size) < 1e-3, normal, 0.0),
        "one": np.eye(1, size, size - 1)[0],
        "heavy tail": normal * np.exp(8 * rng.standard_normal(size)),
        "zeros and inf": special,
        "many inf": many,
        "nan": nan,
    }
    arrays = {name: jnp.asarray(x.astype(np.float32)).astype(dtype) for name, x in cases.items()}
    # A conversion may flush them.
    bits, integer = (23, np.uint32) if dtype == jnp.float32 else (7, np.uint16)
    denormal = rng.integers(0, 1 << bits, size).astype(integer)
    arrays["denormal"] = lax.bitcast_convert_type(jnp.asarray(denormal), dtype)
    return arrays


def magnitudes(x: jax.Array) -> np.ndarray:
    """Bits without the sign: ordered as the magnitudes, denormals and NaN included."""
    bits = np.asarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
    return (bits & np.asarray(np.iinfo(bits.dtype).max >> 1, bits.dtype)).astype(np.int64)


def sign_words(x: jax.Array) -> np.ndarray:
    """One bit a value, 1 where x >= 0, in little-endian words of 32."""
    bits = np.packbits(np.asarray(x, np.float32) >= 0, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view("<u4")


def block_top_k(x: jax.Array, length: int, k: int) -> np.ndarray:
    """Indices in whole blocks of the k largest magnitudes, ascending; ties to the lowest index."""
    blocks = magnitudes(x)[: x.size // length * length].reshape(-1, length)
    return np.sort(np.argsort(-blocks, axis=1, kind="stable")[:, :k], axis=1)
