"""Dithering: every value is rounded at random to a level of its norm, without bias."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import _check, _fields, _packing
from ef_optax._base import Array, Codec, Message, Shape, as_key, bits_of, size_of
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import (
    block_count,
    block_length,
    blockwise,
    divide,
    round_randomly,
    safe_divisor,
    uniform_noise,
)
from ef_optax.compressors._norms import block_norms, power_of_two
from ef_optax.compressors.sign import scale_dtype

NORMS = ("l2", "linf")


def linf_omega(length: int, levels: int) -> float:
    """Variance constant of uniform levels relative to the largest magnitude.

    One level: (sqrt(B) - 1)/2, exact. More: a coordinate's variance is at most (M/s)^2/4 and at
    most M|x|/s, and the largest coordinate has none.

    >>> linf_omega(4, 1), linf_omega(5, 2)
    (0.5, 0.25)
    """
    if levels == 1:
        return (math.sqrt(length) - 1) / 2
    return min((length - 1) / (4 * levels**2), math.sqrt(length - 1) / (2 * levels))


class DitheringCodec(Codec):
    """Sign and level of each value relative to its block's norm; subclasses give the levels."""

    key: Array
    levels: int
    norm: str
    bucket: int | None

    unbiased: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    @abc.abstractmethod
    def relative(self, x: Array, norm: Array) -> Array:
        """Magnitudes x relative to a positive norm, in the unit that ``level`` takes."""

    @abc.abstractmethod
    def level(self, y: Array, key: Array) -> Array:
        """The randomly chosen level number of relative magnitudes."""

    @abc.abstractmethod
    def value(self, level: Array, norm: Array) -> Array:
        """The magnitude that a level number stands for, at this norm."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1).astype(scale_dtype(x.dtype))
        norms = block_norms(flat, self.bucket, self.norm)

        def relative(x: Array, norm: Array) -> Array:
            unit = power_of_two(norm)
            return self.relative(jnp.abs(x) / unit, safe_divisor(norm / unit))

        level = self.level(blockwise(relative, flat, norms, block=self.bucket), key)
        level = jnp.minimum(level.astype(jnp.int32), self.levels)
        codes = jnp.where(flat < 0, -level, level) + self.levels
        return {"codes": _fields.pack(codes, self._width), "norm": norms}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = _fields.unpack(message["codes"], self._width, size_of(like.shape))
        signed = codes.astype(jnp.int32) - self.levels

        def values(signed: Array, norm: Array) -> Array:
            unit = power_of_two(norm)
            value = self.value(jnp.abs(signed), norm / unit) * unit
            return jnp.where(signed < 0, -value, value)

        flat = blockwise(values, signed, message["norm"], block=self.bucket)
        return flat.astype(like.dtype).reshape(like.shape)

    def finite(self, x: Array, message: Message) -> Array:
        """Told by the norms: a NaN or inf makes its bucket's norm NaN or inf.

        False too if the norm of finite numbers has overflowed.
        """
        del x
        return jnp.all(jnp.isfinite(message["norm"]))

    @property
    def _width(self) -> int:
        return _packing.bits_for(2 * self.levels + 1)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        scales = block_count(size, self.bucket) * bits_of(scale_dtype(dtype))
        return scales + size * self._width


@dataclasses.dataclass(frozen=True)
class Dithering(DitheringCodec):
    """Uniform levels j/s of the block's norm (QSGD; TernGrad is s = 1 with the linf norm)."""

    key: Array
    levels: int
    norm: str = "l2"
    bucket: int | None = None

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "exact" if self.norm == "linf" and self.levels == 1 else "bound"

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


@dataclasses.dataclass(frozen=True)
class NaturalDithering(DitheringCodec):
    """Levels 0 and 2^(j - s), j = 1..s, of the leaf's norm."""

    key: Array
    levels: int
    norm: str = "l2"
    bucket: int | None = None
    basis: ClassVar[str] = "bound"

    def relative(self, x: Array, norm: Array) -> Array:
        return (x / norm).astype(jnp.float32)

    def level(self, y: Array, key: Array) -> Array:
        table = self._table
        # The number of levels at or below y, found on the exponent and not by a logarithm.
        exponent = (jax.lax.bitcast_convert_type(y, jnp.int32) >> 23) - 127
        low = jnp.clip(exponent + self.levels, 0, self.levels)
        below, above = table[low], table[jnp.minimum(low + 1, self.levels)]
        up = uniform_noise(key, y.shape) * (above - below) < y - below
        return low + up.astype(low.dtype)

    def value(self, level: Array, norm: Array) -> Array:
        return self._table[level].astype(norm.dtype) * norm

    @property
    def _table(self) -> Array:
        powers = np.ldexp(np.float32(1), np.arange(1 - self.levels, 1))
        return jnp.asarray(np.concatenate([[0.0], powers]), jnp.float32)

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        del num_workers
        tail = math.sqrt(size_of(shape)) * 2.0 ** (1 - self.levels)
        return 1 / 8 + tail * min(1.0, tail)


def _checked(name: str, levels: Any, norm: Any) -> None:
    argument = "states" if name == "qsgd" else "levels"
    _check.count(name, argument, levels)
    _check.word(name, "norm", norm, NORMS)


def qsgd(
    states: int, key: Any = None, *, norm: str = "l2", bucket: int | None = None
) -> Compressor:
    """Uniform stochastic quantisation relative to a norm: QSGD.

    ``C(x)_i = N sign(x_i) l_i/s`` with N the norm of the bucket and l_i the random rounding of
    ``s |x_i|/N`` to one of its two neighbouring integers, so that E C(x) = x. Zeros stay zero.
    omega = min(B/s^2, sqrt(B)/s) for the 2-norm (bound), B the bucket length.

    Args:
      states: s, the number of positive levels; codes are -s..s, of ceil(log2(2s + 1)) bits.
      key: a JAX random key or an int; step, leaf and worker are folded in. The numbers of a step
        are a hash of each value's index and 64 bits of its key (two rounds of MurmurHash3's
        finaliser): a few operations a value, not cryptographic.
      norm: ``"l2"`` or ``"linf"`` (the largest magnitude).
      bucket: length of the pieces that have a norm of their own; None: the whole leaf.

    Returns:
      The compressor. Bits: 32 ceil(d/B) + d ceil(log2(2s + 1)).

    Raises:
      ValueError: for a bad ``states``, ``norm`` or ``bucket``. TypeError: without a key.

    Example:
      Exact when every value is a multiple of N/s, as for (2, 3, 6) with norm 7:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.qsgd(7, key=0)
      >>> compressor.update(jnp.array([2.0, 3.0, 6.0]), compressor.init(None))[0].tolist()
      [2.0, 3.0, 6.0]
      >>> compressor.bits((1000,)), round(compressor.codec.omega(49), 6)
      (4032, 1.0)

    References:
      Alistarh, Grubic, Li, Tomioka, Vojnovic, QSGD, 2017, section 3.1 and Lemma 3.1.
    """
    _checked("qsgd", states, norm)
    _check.count("qsgd", "bucket", bucket, optional=True)
    return Compressor(Dithering(as_key(key, "qsgd"), states, norm, bucket))


def linear_dithering(levels: int, key: Any = None, *, norm: str = "linf") -> Compressor:
    """QSGD's quantiser on whole leaves, relative to the largest magnitude by default.

    ``C(x)_i = N sign(x_i) l_i/s`` as in :func:`ef_optax.qsgd`, without buckets. For the linf norm
    omega = (sqrt(d) - 1)/2 for s = 1 (exact), else min((d-1)/(4 s^2), sqrt(d-1)/(2 s)) (bound).

    Args:
      levels: s, the number of positive levels.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      norm: ``"linf"`` or ``"l2"``.

    Returns:
      The compressor. Bits: 32 + d ceil(log2(2s + 1)).

    Raises:
      ValueError: for a bad ``levels`` or ``norm``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.linear_dithering(1, key=0).codec.omega(4)
      0.5

    References:
      Horvath, Ho, Horvath, Sahu, Canini, Richtarik, Natural compression, 2022, Definition 3.
    """
    _checked("linear_dithering", levels, norm)
    return Compressor(Dithering(as_key(key, "linear_dithering"), levels, norm))


def natural_dithering(levels: int, key: Any = None, *, norm: str = "l2") -> Compressor:
    """Random rounding to the levels 0, 2^(1-s), ..., 1/2, 1 of the leaf's norm.

    Fine levels where the values are: s levels span a range of 2^(s-1). Unbiased, with
    omega = 1/8 + t min(1, t), t = sqrt(d) 2^(1-s) (bound).

    Args:
      levels: s, the number of positive levels, at most 126.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      norm: ``"l2"`` or ``"linf"``.

    Returns:
      The compressor. Bits: 32 + d ceil(log2(2s + 1)).

    Raises:
      ValueError: for a bad ``levels`` or ``norm``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.natural_dithering(3, key=0, norm="linf")
      >>> compressor.update(jnp.array([8.0, -4.0, 2.0]), compressor.init(None))[0].tolist()
      [8.0, -4.0, 2.0]

    References:
      Horvath et al., Natural compression for distributed deep learning, 2022, Theorem 7.
    """
    _checked("natural_dithering", levels, norm)
    if levels > 126:
        raise ValueError(f"natural_dithering: levels={levels} must be at most 126.")
    return Compressor(NaturalDithering(as_key(key, "natural_dithering"), levels, norm))
