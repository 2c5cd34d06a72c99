"""Between top-k and rand-k: comp-(k, k') and mix-(k, k')."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check, _fields, _packing
from ef_optax._base import Array, Message, Shape, as_key, bits_of, size_of
from ef_optax._compressor import Compressor
from ef_optax._random import random_subset
from ef_optax._selection import top_k_indices
from ef_optax.compressors._sparse import IndexedCodec, SparseCodec


@dataclasses.dataclass(frozen=True)
class CompK(IndexedCodec):
    """k of the ``top`` largest at random, times top/k."""

    key: Array
    k: int
    top: int

    deterministic: ClassVar[bool] = False
    basis: ClassVar[str] = "bound"

    def _plan(self, size: int) -> tuple[int, int]:
        """K and k' of a leaf of this size."""
        top = min(self.top, size)
        return min(self.k, top), top

    def count(self, size: int) -> int:
        return self._plan(size)[0]

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        k, top = self._plan(flat.size)
        seed = jax.random.bits(key, (), jnp.uint32)
        indices = top_k_indices(flat, top)[random_subset(seed, top, k)]
        values = flat[indices] * jnp.asarray(top / max(1, k), x.dtype)
        return self.message(values, indices, flat.size)

    def eta(self, shape: Shape) -> float:
        """EF-BV's bias constant: ``||E C(x) - x|| <= eta ||x||``, sqrt((d - k')/d)."""
        size = size_of(shape)
        return math.sqrt((size - self._plan(size)[1]) / size) if size else 0.0

    def spread(self, shape: Shape) -> float:
        """EF-BV's variance constant: ``E||C(x) - E C(x)||^2 <= omega ||x||^2``, k'/k - 1."""
        k, top = self._plan(size_of(shape))
        return top / k - 1 if k else 0.0

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """1 - eta^2 - omega where that is positive (for k' < d it may not be)."""
        del num_workers
        alpha = 1 - self.eta(shape) ** 2 - self.spread(shape)
        return alpha if alpha > 0 else None


@dataclasses.dataclass(frozen=True)
class MixK(SparseCodec):
    """The k largest and ``random`` of the others at random, as they are."""

    key: Array
    k: int
    random: int

    deterministic: ClassVar[bool] = False
    basis: ClassVar[str] = "exact"

    def _plan(self, size: int) -> tuple[int, int]:
        """How many are kept by size and how many at random."""
        top = min(self.k, size)
        return top, min(self.random, size - top)

    def count(self, size: int) -> int:
        return sum(self._plan(size))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        top = top_k_indices(flat, self._plan(flat.size)[0]).astype(jnp.uint32)
        seed = jax.random.bits(key, (1,), jnp.uint32)
        indices = self._indices(top, seed, flat.size)
        packed = _fields.pack(top, _packing.bits_for(flat.size))
        return {"top": packed, "seed": seed, "values": flat[indices]}

    def _indices(self, top: Array, seed: Array, size: int) -> Array:
        """The indices of the largest, then random ones of the rest, found from the seed."""
        kept, extra = self._plan(size)
        rank = random_subset(seed[0], size - kept, extra)
        # The r-th index that is not in top is r plus the number of top's indices before it.
        gaps = top - jnp.arange(kept, dtype=jnp.uint32)
        passed = jnp.searchsorted(gaps, rank, side="right").astype(jnp.uint32)
        return jnp.concatenate([top, rank + passed])

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        top = _fields.unpack(message["top"], _packing.bits_for(size), self._plan(size)[0])
        return self._indices(top, message["seed"], size), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        kept = self._plan(size)[0]
        return 32 + kept * _packing.bits_for(size) + self.count(size) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """(k + random)/d, in expectation."""
        del num_workers
        size = size_of(shape)
        return self.count(size) / size if size else 1.0


def comp_k(k: int, top: int, key: Any = None) -> Compressor:
    """comp-(k, k'): k of the k' largest magnitudes, at random, times k'/k.

    In the class of EF-BV with bias eta = sqrt((d - k')/d) and variance omega = k'/k - 1 (bounds,
    ``codec.eta(shape)`` and ``codec.spread(shape)``). Biased unless k' = d; contractive with
    alpha = 1 - eta^2 - omega only where that is positive.

    Args:
      k: values sent of each leaf.
      top: k' >= k, among how many of the largest they are drawn.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: k (32 + ceil(log2 d)).

    Raises:
      ValueError: unless 1 <= k <= top. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> codec = ef.comp_k(2, 8, key=0).codec
      >>> codec.eta(32), codec.spread(32)
      (0.8660254037844386, 3.0)

    References:
      Condat, Yi, Richtarik, EF-BV, 2022, section 2.4.
    """
    _check.count("comp_k", "k", k)
    _check.count("comp_k", "top", top)
    if top < k:
        raise ValueError(f"comp_k: top={top} must be at least k={k}.")
    return Compressor(CompK(as_key(key, "comp_k"), k, top))


def mix_k(k: int, random: int, key: Any = None) -> Compressor:
    """mix-(k, k'): the k largest magnitudes, and k' of the others at random.

    Unscaled. alpha = (k + k')/d (exact for equal magnitudes). A 32-bit seed says which the random
    ones are.

    Args:
      k: values kept by size.
      random: values kept at random.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: 32 + k (32 + ceil(log2 d)) + 32 k'.

    Raises:
      ValueError: for a bad ``k`` or ``random``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.mix_k(1, 2, key=0)
      >>> out, _ = compressor.update(jnp.array([1.0, 5.0, 1.0, 1.0]), compressor.init(None))
      >>> float(out[1]), int((out != 0).sum())
      (5.0, 3)

    References:
      Condat, Yi, Richtarik, EF-BV, 2022, section 2.3.
    """
    _check.count("mix_k", "k", k)
    _check.count("mix_k", "random", random)
    return Compressor(MixK(as_key(key, "mix_k"), k, random))
