"""Variance-optimal random sparsification, which always keeps large values and rarely small ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.norms import leaf_norm, power_of_two
from ef_optax._numeric.random import as_key, uniform_noise
from ef_optax._numeric.shapes import Shape
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import IndexedCodec


def keep_probabilities(magnitude: Array, ratio: float, iterations: int) -> Array:
    """Probabilities p_i = min(1, c |x_i|) with sum at most ratio d, by the greedy iteration.

    Args:
      magnitude: |x|, flat and not empty.
      ratio: expected share to keep.
      iterations: how often the probability that the cap at 1 frees is given to the other values.

    Returns:
      Probabilities in [0, 1]; all zero for a zero leaf.

    Example:
      >>> keep_probabilities(jnp.array([6.0, 1.0, 1.0, 0.0]), 0.5, 2).tolist()
      [1.0, 0.5, 0.5, 0.0]
    """
    target = ratio * magnitude.size
    total = safe_divisor(jnp.sum(magnitude))
    p = jnp.minimum(target * (magnitude / total), 1)
    growing = jnp.ones((), bool)
    for _ in range(iterations):
        free = p < 1
        room = target - jnp.sum(~free, dtype=p.dtype)
        c = room / safe_divisor(jnp.sum(jnp.where(free, p, 0)))
        growing = growing & (c > 1)
        p = jnp.where(growing, jnp.minimum(c * p, 1), p)
    return p


@dataclasses.dataclass(frozen=True)
class Wangni(IndexedCodec):
    """``x_i / p_i`` with probability p_i, else 0, for the probabilities of least variance."""

    key: Array
    ratio: float
    iterations: int = 2

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, deterministic=False)

    def count(self, size: int) -> int:
        """The expected number of values, plus six standard deviations."""
        k = resolve_k(self.ratio, None, size)
        return min(size, k + math.ceil(6 * math.sqrt(k)))

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """``1/p - 1`` for values of equal size, which are all kept with ``p = ratio``."""
        del shape, num_workers
        return 1 / self.ratio - 1

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        if flat.size:
            scale = power_of_two(leaf_norm(flat, "linf"))
            p = keep_probabilities(jnp.abs(flat) / scale, self.ratio, self.iterations)
            kept = uniform_noise(key, flat.shape).astype(p.dtype) < p
            flat = jnp.where(kept, flat / safe_divisor(p), jnp.zeros((), flat.dtype))
        indices = top_k_indices(flat, self.count(flat.size))
        return self.message(flat[indices], indices, flat.size)

    def support(self, x: Array, message: Message) -> Array:
        indices, values = self.parts(message, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jnp.zeros(x.size, bool).at[indices].set(values != 0).reshape(x.shape)


def wangni(ratio: float, key: Any = None, *, iterations: int = 2) -> Compressor:
    """Random sparsification with the least variance for its expected number of values.

    ``C(x)_i = x_i/p_i`` with probability p_i, else 0, where ``p_i = min(1, c |x_i|)``, and a greedy
    iteration finds p_i that add up to about ratio d. It is unbiased. The variance
    ``sum x_i^2 (1/p_i - 1)`` depends on the data, and no constant bounds it for few iterations.

    The message holds k + 6 sqrt(k) values, six standard deviations more than expected. In the rare
    case of more, the largest are sent.

    Args:
      ratio: expected share in (0, 1].
      key: a JAX random key or an int; step, leaf and worker are folded in.
      iterations: number of greedy iterations; each takes a pass over the leaf.

    Returns:
      The compressor. Bits: c (32 + ceil(log2 d)), c = min(d, k + ceil(6 sqrt k)).

    Raises:
      ValueError: for a bad ``ratio`` or ``iterations``. TypeError: without a key.

    Example:
      The largest value is always kept:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.wangni(0.5, key=0)
      >>> x = jnp.array([60.0, 1.0, 1.0, 1.0])
      >>> float(compressor.update(x, compressor.init(x))[0][0])
      60.0

    References:
      Wangni, Wang, Liu, Zhang, Gradient sparsification for communication-efficient distributed
      optimization, 2018, Algorithm 3.
    """
    check.ratio("wangni", "ratio", ratio)
    check.count("wangni", "iterations", iterations)
    return Compressor(Wangni(as_key(key, "wangni"), float(ratio), iterations))
