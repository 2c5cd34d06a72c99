"""Comp-k: random entries among the largest."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import as_key, random_subset
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import Followable, IndexedCodec


@dataclasses.dataclass(frozen=True)
class CompK(IndexedCodec, Followable):
    """k values drawn from the ``top`` largest, times top/k."""

    key: Array
    k: int
    top: int

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=False, basis="bound")

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
        return self.message(self.taken(x, indices), indices, flat.size)

    def taken(self, x: Array, indices: Array) -> Array:
        k, top = self._plan(x.size)
        return x.reshape(-1)[indices] * jnp.asarray(top / max(1, k), x.dtype)

    def eta(self, shape: Shape) -> float:
        """EF-BV's bias constant: ``||E C(x) - x|| <= eta ||x||``, sqrt((d - k')/d)."""
        size = size_of(shape)
        return math.sqrt((size - self._plan(size)[1]) / size) if size else 0.0

    def spread(self, shape: Shape) -> float:
        """EF-BV's variance constant: ``E||C(x) - E C(x)||^2 <= omega ||x||^2``, k'/k - 1."""
        k, top = self._plan(size_of(shape))
        return top / k - 1 if k else 0.0

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """1 - eta^2 - omega if that is positive (for k' < d it may not be), else None."""
        del num_workers
        alpha = 1 - self.eta(shape) ** 2 - self.spread(shape)
        return alpha if alpha > 0 else None


def comp_k(k: int, top: int, key: Any = None) -> Compressor:
    """comp-(k, k'): k values drawn at random from the k' largest magnitudes, times k'/k.

    It belongs to the class of EF-BV with bias eta = sqrt((d - k')/d) and variance omega = k'/k - 1
    (bounds, ``codec.eta(shape)`` and ``codec.spread(shape)``). It is biased unless k' = d, and
    contractive with alpha = 1 - eta^2 - omega if that is positive.

    Args:
      k: values sent of each leaf.
      top: k' >= k, the number of largest values from which they are drawn.
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
    check.count("comp_k", "k", k)
    check.count("comp_k", "top", top)
    if top < k:
        raise ValueError(f"comp_k: top={top} must be at least k={k}.")
    return Compressor(CompK(as_key(key, "comp_k"), k, top))
