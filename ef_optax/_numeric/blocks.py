"""Leaves cut into blocks, and the random numbers of stochastic rounding.

Randomness comes from a counter-based hash: element i gets two rounds of MurmurHash3's finaliser on
i and a 64-bit seed, which comes from the step's key. The hash has no state, vectorises, and costs a
few integer operations per element; a cryptographic generator would cost more than the rest of an
encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array

# Shorter tiles do not fill vector registers.
_SHORTEST_TILE = 8


def block_count(size: int, block: int | None) -> int:
    """Number of blocks of a leaf: ``ceil(size / block)``, 1 if ``block`` is None, 0 if it is empty.

    >>> block_count(10, 4), block_count(10, None), block_count(0, None)
    (3, 1, 0)
    """
    return math.ceil(size / (block or size)) if size else 0


def block_length(size: int, block: int | None) -> int:
    """Elements of the longest block, at least 1.

    >>> block_length(10, 4), block_length(3, 4), block_length(10, None), block_length(0, None)
    (4, 3, 10, 1)
    """
    return max(1, min(size, block or size))


def to_blocks(x: Array, block: int | None, *, mode: str = "constant") -> Array:
    """The flattened leaf as (blocks, block length); the last block is padded.

    Args:
      x: any shape.
      block: block length, or None for the whole leaf.
      mode: ``"constant"`` pads with zeros, ``"edge"`` repeats the last element.
    """
    flat, length = x.reshape(-1), block_length(x.size, block)
    missing = -x.size % length
    if missing:
        flat = jnp.pad(flat, (0, missing), mode=mode)
    return flat.reshape(-1, length)


def from_blocks(blocks: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The inverse of :func:`to_blocks`, in the shape and dtype of ``like``."""
    size = math.prod(like.shape)
    return blocks.reshape(-1)[:size].astype(like.dtype).reshape(like.shape)


def blockwise(f: Callable[..., Array], x: Array, *each: Array, block: int | None) -> Array:
    """Applies ``f`` to the values of a leaf and the parameters of their blocks, without a copy.

    The leaf is processed in equal tiles, none of which crosses the border of a block. Their length
    is the largest that divides both the leaf and a block, so that a shorter last block needs no
    special case. If such tiles would be too short, each full block is a tile, and the last block is
    processed separately.

    Args:
      f: an elementwise function of (tiles, length) values and of (tiles, 1) for each of ``each``.
      x: the leaf, any shape.
      *each: parameters with one entry per block, (blocks,).
      block: block length, or None for the whole leaf.

    Returns:
      Shape (x.size,).
    """
    flat, length = x.reshape(-1), block_length(x.size, block)
    tile = math.gcd(x.size, length)
    tile = tile if tile >= _SHORTEST_TILE else length
    whole = x.size // tile
    rows = [jnp.repeat(one, length // tile)[:whole, None] for one in each]
    out = f(flat[: whole * tile].reshape(whole, tile), *rows).reshape(-1)
    if whole * tile < x.size:
        last = f(flat[None, whole * tile :], *(one[-1:, None] for one in each))
        out = jnp.concatenate([out, last[0]])
    return out
