"""Equal parts of a flattened leaf, one for each worker; the last one is padded with zeros."""

from __future__ import annotations

import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, size_of


def shard_size(shape: Shape, n: int) -> int:
    """The number of values in each of n shards of a leaf.

    >>> shard_size((3, 5), 4)
    4
    """
    return -(-size_of(shape) // n)


def shards_of(x: Array, n: int) -> Array:
    """All shards of a leaf, as (n, shard)."""
    return jnp.pad(x.reshape(-1), (0, n * shard_size(x.shape, n) - x.size)).reshape(n, -1)


def is_real(shape: Shape, index: Array | int, n: int) -> Array:
    """Which values of shard number ``index`` are part of the leaf, and not padding."""
    size = shard_size(shape, n)
    return jnp.arange(size, dtype=jnp.int32) < size_of(shape) - index * size


def joined(shards: Array, shape: Shape) -> Array:
    """The leaf of this shape whose shards these are, the inverse of :func:`shards_of`."""
    return shards.reshape(-1)[: size_of(shape)].reshape(shape)
