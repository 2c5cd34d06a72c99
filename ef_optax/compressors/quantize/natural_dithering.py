"""Natural dithering: random rounding to levels that are powers of two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import as_key, uniform_noise
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._dithering import DitheringCodec, _checked, spread_error


@dataclasses.dataclass(frozen=True)
class NaturalDithering(DitheringCodec):
    """The levels 0 and 2^(j - s), j = 1..s, of the leaf's norm."""

    key: Array
    levels: int
    norm: str = "l2"
    bucket: int | None = None

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, basis="bound")

    def relative(self, x: Array, norm: Array) -> Array:
        return (x / norm).astype(jnp.float32)

    def level(self, y: Array, key: Array) -> Array:
        table = self._table
        # The number of levels at or below y, from the exponent bits instead of a logarithm.
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

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """With the 2-norm; with the largest magnitude, values of equal size have no error."""
        del num_workers
        tail = math.sqrt(size_of(shape)) * 2.0 ** (1 - self.levels)
        return spread_error(tail) if self.norm == "l2" else 0.0


def natural_dithering(levels: int, key: Any = None, *, norm: str = "l2") -> Compressor:
    """Random rounding to the levels 0, 2^(1-s), ..., 1/2, 1 of the leaf's norm.

    The levels are fine for small values: s levels span a range of 2^(s-1). It is unbiased, with
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
