"""Sparsifiers by a threshold: how many values pass depends on the data, the message does not.

A message has a fixed capacity c. If fewer values pass, the free slots carry zeros; if more pass,
the c largest are sent and the others stay in the residual, counted, never dropped.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check, _fields, _packing
from ef_optax._base import Array, Message, Shape, bits_of, size_of, wide_dtype
from ef_optax._bitmask import count_ones, positions
from ef_optax._compressor import Compressor
from ef_optax._search import at_least, cut, magnitude_order, search
from ef_optax._selection import top_k_indices
from ef_optax.compressors._norms import leaf_norm, leaf_sums
from ef_optax.compressors._sparse import SparseCodec
from ef_optax.compressors.sparsify import resolve_k


class ThresholdCodec(SparseCodec):
    """Values whose magnitude reaches a border; subclasses say which, and how many have room.

    Borders are integers in the order of `_selection.magnitude_order`.
    """

    @abc.abstractmethod
    def border(self, flat: Array) -> Array:
        """What a magnitude must reach to be sent."""

    def kept(self, size: int) -> int:
        """How many values are sent, the largest, where more pass than there is room for."""
        return self.count(size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat, capacity = x.reshape(-1), self.count(x.size)
        if not capacity:
            return {
                "passed": jnp.zeros(1, jnp.uint32),
                "indices": _fields.pack(jnp.zeros(0, jnp.uint32), 0),
                "values": flat,
            }
        words = at_least(flat)(self.border(flat))
        passed = count_ones(words)
        room = passed <= capacity
        words = jax.lax.cond(room, lambda: words, lambda: _largest(flat, self.kept(x.size)))
        sent = jnp.arange(capacity, dtype=jnp.uint32) < count_ones(words)
        indices = jnp.where(sent, positions(words, capacity), 0)
        return {
            "passed": passed[None],
            "indices": _fields.pack(indices, _packing.bits_for(x.size)),
            "values": jnp.where(sent, flat[indices], jnp.zeros((), x.dtype)),
        }

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        indices = _fields.unpack(message["indices"], _packing.bits_for(size), self.count(size))
        return indices, message["values"]

    def support(self, x: Array, message: Message) -> Array:
        indices, values = self.parts(message, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jnp.zeros(x.size, bool).at[indices].max(values != 0).reshape(x.shape)

    def overflow(self, message: Message) -> Array:
        """How many values passed and found no room, a uint32 scalar."""
        return message["passed"][0] - jnp.sum(message["values"] != 0, dtype=jnp.uint32)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return 32 + self.count(size) * (bits_of(dtype) + _packing.bits_for(size))


def _passing(flat: Array, border: Array) -> Array:
    """How many magnitudes reach the border."""
    return count_ones(at_least(flat)(border))


def _largest(flat: Array, k: int) -> Array:
    """Mask of the k largest magnitudes, packed; ties to the lowest index."""
    mask, zero = at_least(flat), magnitude_order(flat[0]) & 0
    high = zero + jnp.asarray(jnp.iinfo(zero.dtype).max)
    border, _, _ = search(mask, k, k, flat.size, zero, high)
    return cut(mask(border), mask(border + 1), k, k)


@dataclasses.dataclass(frozen=True)
class Threshold(ThresholdCodec):
    """``|x| >= value``, at most ``capacity`` of the leaf."""

    value: float
    capacity: float
    homogeneous: ClassVar[bool] = False

    def count(self, size: int) -> int:
        return resolve_k(self.capacity, None, size)

    def border(self, flat: Array) -> Array:
        return magnitude_order(jnp.asarray(self.value, flat.dtype))


@dataclasses.dataclass(frozen=True)
class SampledTopK(ThresholdCodec):
    """DGC's threshold from a strided sample, lowered until enough values pass."""

    ratio: float
    sample: float

    upper: ClassVar[float] = 1.3
    lower: ClassVar[float] = 0.8
    rounds: ClassVar[int] = 10

    def count(self, size: int) -> int:
        return min(size, math.floor(self.upper * resolve_k(self.ratio, None, size)))

    def kept(self, size: int) -> int:
        return resolve_k(self.ratio, None, size)

    def border(self, flat: Array) -> Array:
        sample = flat[:: max(1, min(flat.size // 2, math.floor(1 / self.sample)))]
        largest = top_k_indices(sample, resolve_k(self.ratio, None, sample.size))
        first = jnp.min(jnp.abs(sample[largest]))
        enough = math.ceil(self.lower * resolve_k(self.ratio, None, flat.size))

        def too_few(state: tuple[Array, Array]) -> Array:
            rounds, threshold = state
            few = _passing(flat, magnitude_order(threshold)) < enough
            return (rounds < self.rounds) & few

        def lowered(state: tuple[Array, Array]) -> tuple[Array, Array]:
            rounds, threshold = state
            return rounds + 1, threshold * jnp.asarray(0.8, threshold.dtype)

        start = (first * 0).astype(jnp.int32)  # typed like the data, for loops inside maps
        _, threshold = jax.lax.while_loop(too_few, lowered, (start, first))
        return jnp.maximum(magnitude_order(threshold), 1)


@dataclasses.dataclass(frozen=True)
class RedSync(ThresholdCodec):
    """A threshold between the mean and the largest magnitude, by bisection."""

    ratio: float

    def count(self, size: int) -> int:
        return min(size, 2 * resolve_k(self.ratio, None, size))

    def border(self, flat: Array) -> Array:
        k, wide = resolve_k(self.ratio, None, flat.size), flat.astype(wide_dtype(flat.dtype))
        mean = (leaf_sums(jnp.abs(wide))[0] / flat.size).astype(flat.dtype)
        largest = leaf_norm(wide, "linf").astype(flat.dtype)
        low, high = jnp.zeros((), flat.dtype), jnp.ones((), flat.dtype)
        found, threshold = jnp.zeros((), bool), largest
        for _ in range(3):  # the interval [0, 1] is halved while it is longer than 0.2
            middle = (low + high) / 2
            trial = mean + middle * (largest - mean)
            threshold = jnp.where(found, threshold, trial)
            passed = _passing(flat, magnitude_order(trial) + 1)
            found = found | ((passed > k) & (passed < 2 * k))
            too_few = 2 * passed < k
            low, high = jnp.where(too_few, low, middle), jnp.where(too_few, middle, high)
        return magnitude_order(threshold) + 1


def threshold(value: float, *, capacity: float = 0.1) -> Compressor:
    """Hard threshold: sends what is at least ``value`` in magnitude.

    ``C(x)_i = x_i`` if ``|x_i| >= value``, else 0, as long as at most c = ceil(capacity d) pass; of
    more the c largest are sent. An absolute compressor: without overflow
    ``||C(x) - x||^2 < (number not sent) value^2``; no contraction constant, not homogeneous.

    Args:
      value: the threshold, > 0, in the units of what is compressed.
      capacity: room in the message, as a share of the leaf in (0, 1].

    Returns:
      The compressor. Bits: 32 + c (32 + ceil(log2 d)), of which the first word says how many
      passed: the *information* is passed (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``value`` or ``capacity``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.threshold(1.0, capacity=0.5)
      >>> compressor.update(jnp.array([-1.0, 0.9, -3.0, 2.0]), compressor.init(None))[0].tolist()
      [0.0, 0.0, -3.0, 2.0]

    References:
      Sahu et al., Rethinking gradient sparsification as total error minimization, 2021.
    """
    _check.static_positive("threshold", "value", value)
    _check.ratio("threshold", "capacity", capacity)
    return Compressor(Threshold(float(value), float(capacity)))


def sampled_top_k(ratio: float, *, sample: float = 0.01) -> Compressor:
    """DGC's approximate top-k: a threshold from a sample, between .8 k and 1.3 k values.

    The threshold is the ratio's quantile of every s-th magnitude, s = floor(1/sample). While fewer
    than .8 k values pass, it is multiplied by .8, at most ten times; if more than 1.3 k pass, the k
    largest of them are sent. Zeros are never sent. No contraction constant: in ten rounds the
    threshold falls by a factor of 9, which a leaf can defeat.

    Args:
      ratio: target share in (0, 1].
      sample: share of the leaf that is sampled, in (0, 1].

    Returns:
      The compressor. Bits: 32 + floor(1.3 k) (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``ratio`` or ``sample``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor = ef.sampled_top_k(0.1, sample=0.1)
      >>> x = jax.random.normal(jax.random.key(0), (1000,))
      >>> sent, _ = compressor.update(x, compressor.init(x))
      >>> 80 <= int((sent != 0).sum()) <= 130
      True

    References:
      Lin, Han, Mao, Wang, Dally, Deep gradient compression, 2018, section 5, and the authors'
      public implementation.
    """
    _check.ratio("sampled_top_k", "ratio", ratio)
    _check.ratio("sampled_top_k", "sample", sample)
    return Compressor(SampledTopK(float(ratio), float(sample)))


def redsync(ratio: float) -> Compressor:
    """RedSync's threshold: three bisections between the mean and the largest magnitude.

    t = mean + r (max - mean) with r = 1/2 at first; it stops as soon as between k and 2k values are
    above t, goes down if fewer than k/2 are, else up. What is above the last t is sent, at most the
    2k largest. No contraction constant is known.

    Args:
      ratio: target share in (0, 1]; k = ceil(ratio d).

    Returns:
      The compressor. Bits: 32 + min(d, 2k) (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``ratio``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.redsync(0.25)
      >>> compressor.update(jnp.array([1.0, 9.0, -8.0, 0.0]), compressor.init(None))[0].tolist()
      [0.0, 9.0, 0.0, 0.0]

    References:
      Fang, Fu, Yang, Hsieh, RedSync, 2019, Algorithm 3 (threshold binary search selection).
    """
    _check.ratio("redsync", "ratio", ratio)
    return Compressor(RedSync(float(ratio)))
