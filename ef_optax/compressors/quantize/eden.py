"""DRIVE and EDEN: codes of few bits for a rotated vector, with a scale fitted to the vector."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.norms import leaf_norm, power_of_two
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax._numeric.transforms import hadamard_forward, hadamard_inverse, hadamard_length
from ef_optax.compressors.compressor import Compressor

SCALES = ("unbiased", "mse")


@functools.cache
def normal_centroids(bits: int) -> tuple[float, ...]:
    """The 2^bits values with the least mean squared error for a standard normal, ascending.

    They are found by Lloyd's iteration, from the asymptotically optimal spacing.

    >>> [round(c, 4) for c in normal_centroids(2)]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    count = 2**bits
    # The density of optimal points is proportional to that of a normal of variance 3.
    grid = np.linspace(-8 * math.sqrt(3), 8 * math.sqrt(3), 200_001)
    mass = np.cumsum(np.exp(-(grid**2) / 6))
    points = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, grid)
    cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    for _ in range(300):
        borders = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
        density = np.exp(-(borders**2) / 2) / math.sqrt(2 * math.pi)
        points = (density[:-1] - density[1:]) / np.diff(cdf(borders))
    points = (points - points[::-1]) / 2
    return tuple(points.tolist())


def fitted_scale(codes: Array, y: Array, kind: str) -> Array:
    """The factor that makes ``codes`` an estimate of y.

    ``"mse"`` is <codes, y>/||codes||^2, which has the least error. ``"unbiased"`` is
    ||y||^2/<codes, y>, with which the estimate is unbiased if y is rotated uniformly at random.

    >>> y = jnp.array([1.0, -2.0, 3.0])
    >>> round(float(fitted_scale(jnp.sign(y), y, "unbiased")), 4)  # 14 / 6
    2.3333
    """
    power = power_of_two(leaf_norm(y, "linf"))
    scaled = y / power
    inner = jnp.sum(codes * scaled)
    if kind == "mse":
        return power * inner / jnp.sum(jnp.square(codes))
    return power * jnp.sum(jnp.square(scaled)) / safe_divisor(inner)


@dataclasses.dataclass(frozen=True)
class Eden(Codec):
    """The nearest of 2^width centroids for each rotated value; DRIVE has one bit."""

    width: int
    key: Array
    scale: str = "unbiased"

    @property
    def traits(self) -> Traits:
        return Traits(
            deterministic=False,
            basis="bound" if self.scale == "mse" and self.width == 1 else "asymptotic",
        )

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        seed = jax.random.bits(key, (1,), jnp.uint32)
        flat = x.reshape(-1).astype(wide_dtype(x.dtype))
        y = hadamard_forward(flat, jax.random.key(seed[0]))
        centroids = self._centroids(y.dtype)
        power = power_of_two(leaf_norm(y, "linf"))
        spread = jnp.sqrt(jnp.mean(jnp.square(y / power)))
        z = y / power / safe_divisor(spread)
        # Zero counts as positive: its code is the upper of the two middle values.
        codes = jnp.searchsorted((centroids[1:] + centroids[:-1]) / 2, z, side="right")
        scale = fitted_scale(centroids[codes], y, self.scale)
        return {"seed": seed, "codes": fields.pack(codes, self.width), "scale": scale[None]}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        size = size_of(like.shape)
        scale = message["scale"]
        codes = fields.unpack(message["codes"], self.width, hadamard_length(size))
        y = self._centroids(scale.dtype)[codes] * scale
        x = hadamard_inverse(y, jax.random.key(message["seed"][0]), size)
        return x.astype(like.dtype).reshape(like.shape)

    def _centroids(self, dtype: Any) -> Array:
        return jnp.asarray(np.asarray(normal_centroids(self.width)), dtype)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 32 + self.width * hadamard_length(size_of(shape)) + bits_of(wide_dtype(dtype))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """1/D for one bit and the scale of least error, as for the scaled sign; else None."""
        del num_workers
        if self.scale != "mse" or self.width != 1:
            return None
        return 1 / hadamard_length(size_of(shape))


def eden(bits: int, key: Any = None) -> Compressor:
    """EDEN: DRIVE with any number of bits per value.

    The rotated leaf, scaled to mean square 1, is rounded to the nearest of the 2^bits values that
    are best for a standard normal (Lloyd-Max). These are scaled so that <C(x), x> = ||x||^2, and
    rotated back. The result is nearly unbiased, as for :func:`ef_optax.drive`. No constant is
    known. Each bit divides the squared error by about four.

    Args:
      bits: bits of a value, 1 to 8.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: bits D + 64, with D the next power of two.

    Raises:
      ValueError: for a bad ``bits``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.eden(4, key=0).bits((1000,))
      4160

    References:
      Vargaftik et al., EDEN: communication-efficient and robust distributed mean estimation, 2022,
      Algorithm 1.
    """
    check.count("eden", "bits", bits, least=1, most=8)
    return Compressor(Eden(bits, as_key(key, "eden")))
