"""Dithering: unbiased random rounding of every value to a level of its block's norm."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.blocks import block_count, block_length, blockwise
from ef_optax._numeric.division import divide, safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.norms import block_norms, power_of_two
from ef_optax._numeric.random import round_randomly
from ef_optax._numeric.shapes import Shape, bits_for, size_of

NORMS = ("l2", "linf")


def linf_omega(length: int, levels: int) -> float:
    """Variance constant of uniform levels relative to the largest magnitude.

    For one level it is (sqrt(B) - 1)/2 (exact). For more levels it is a bound, since the variance
    of a coordinate is at most (M/s)^2/4 and at most M|x|/s, and 0 for the largest coordinate.

    >>> linf_omega(4, 1), linf_omega(5, 2)
    (0.5, 0.25)
    """
    if levels == 1:
        return (math.sqrt(length) - 1) / 2
    return min((length - 1) / (4 * levels**2), math.sqrt(length - 1) / (2 * levels))


def spread_error(ratio: float) -> float:
    """The largest squared error of rounding values, all of them below or near the smallest level.

    With 1 as the smallest level, a value a <= 1 has the squared error a (1 - a) <= 1/4.

    Args:
      ratio: the smallest level over the root mean square of the values.

    >>> spread_error(3.0), spread_error(1.0)
    (2.0, 0.25)
    """
    return ratio - 1 if ratio >= 2 else ratio**2 / 4


class DitheringCodec(Codec):
    """Sends each value's sign and its level relative to a norm; subclasses define the levels."""

    key: Array
    levels: int
    norm: str
    bucket: int | None

    @property
    def separable_into(self) -> int | None:
        return self.bucket

    @property
    def ignores_zeros(self) -> bool:
        return True

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, deterministic=False, streams=True)

    @abc.abstractmethod
    def relative(self, x: Array, norm: Array) -> Array:
        """Magnitudes x relative to a positive norm, scaled as ``level`` expects them."""

    @abc.abstractmethod
    def level(self, y: Array, key: Array) -> Array:
        """The level numbers of relative magnitudes, rounded at random."""

    @abc.abstractmethod
    def value(self, level: Array, norm: Array) -> Array:
        """The magnitude that a level number stands for, at this norm."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1).astype(scale_dtype(x.dtype))
        norms = block_norms(flat, self.bucket, self.norm)

        def relative(x: Array, norm: Array) -> Array:
            scale = power_of_two(norm)
            return self.relative(jnp.abs(x) / scale, safe_divisor(norm / scale))

        level = self.level(blockwise(relative, flat, norms, block=self.bucket), key)
        level = jnp.minimum(level.astype(jnp.int32), self.levels)
        codes = jnp.where(flat < 0, -level, level) + self.levels
        return {"codes": fields.pack(codes, self._width), "norm": norms}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self._width, size_of(like.shape))
        signed = codes.astype(jnp.int32) - self.levels

        def values(signed: Array, norm: Array) -> Array:
            scale = power_of_two(norm)
            value = self.value(jnp.abs(signed), norm / scale) * scale
            return jnp.where(signed < 0, -value, value)

        flat = blockwise(values, signed, message["norm"], block=self.bucket)
        return flat.astype(like.dtype).reshape(like.shape)

    def finite(self, x: Array, message: Message) -> Array:
        """Checks only the norms: a NaN or inf makes its bucket's norm NaN or inf.

        The result is also false if the norm of finite numbers overflows.
        """
        del x
        return jnp.all(jnp.isfinite(message["norm"]))

    @property
    def _width(self) -> int:
        return bits_for(2 * self.levels + 1)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = block_count(size, self.bucket) * bits_of(scale_dtype(dtype))
        return scales + size * self._width


@dataclasses.dataclass(frozen=True)
class Dithering(DitheringCodec):
    """Uniform levels j/s of the block's norm (QSGD, and TernGrad with s = 1 and the linf norm)."""

    key: Array
    levels: int
    norm: str = "l2"
    bucket: int | None = None

    @property
    def traits(self) -> Traits:
        exact = self.norm == "linf" and self.levels == 1
        return dataclasses.replace(super().traits, basis="exact" if exact else "bound")

    def relative(self, x: Array, norm: Array) -> Array:
        return x * self.levels / norm

    def level(self, y: Array, key: Array) -> Array:
        return round_randomly(y, key)

    def value(self, level: Array, norm: Array) -> Array:
        return level.astype(norm.dtype) * divide(norm, self.levels)

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        del num_workers
        length, s = block_length(size_of(shape), self.bucket), self.levels
        if self.norm == "linf":
            return linf_omega(length, s)
        return min(length / s**2, math.sqrt(length) / s)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """With the 2-norm; with the largest magnitude, values of equal size have no error."""
        del num_workers
        length = block_length(size_of(shape), self.bucket)
        return spread_error(math.sqrt(length) / self.levels) if self.norm == "l2" else 0.0


def _checked(name: str, levels: Any, norm: Any) -> None:
    argument = "states" if name == "qsgd" else "levels"
    check.count(name, argument, levels)
    check.word(name, "norm", norm, NORMS)
