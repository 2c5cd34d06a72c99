"""Top-k of each block on TPU: eight blocks in fast memory, without a sort or a gather.

Two bisections count entries in all blocks of a program at once. The first finds the k-th magnitude
by its bits; the second finds the index at which its ties are cut. Products with triangular matrices
of ones, which are exact in float32, rank the entries that are kept. The slots of the result are
along the sublanes: each row of a block adds the indices of its slots, so that every slot has its
index on one lane. Another product sums over the lanes and puts the slots along them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ef_optax._kernels.dispatch import like
from ef_optax._numeric.magnitude import magnitude_order

_LANES = 128
_SUBLANES = 8
# Blocks per program: as many as a tile of results has rows.
_BLOCKS = 8


@functools.partial(jax.jit, static_argnames=("length", "k", "interpret"))
def block_top_k_indices(x: jax.Array, length: int, k: int, interpret: bool = False) -> jax.Array:
    """Indices in each block of its k largest magnitudes, ascending; ties go to the lowest index.

    If the length of a leaf is not a multiple of ``length``, the leaf is cut first, which copies it.

    Args:
      x: float32 or bfloat16 of shape (d,); entries after the last full block are not read.
      length: a multiple of 2048, 4096 at most.
      k: ``0 < k < length``.
      interpret: runs the kernel as JAX operations, on any backend.

    Returns:
      int32 of shape (d // length, k).
    """
    count, rows = x.size // length, length // _LANES
    slots = pl.cdiv(k, _SUBLANES) * _SUBLANES
    blocks = x[: count * length].reshape(count, rows, _LANES)
    indices = pl.pallas_call(
        functools.partial(_kernel, k=k),
        grid=(pl.cdiv(count, _BLOCKS),),
        in_specs=[pl.BlockSpec((_BLOCKS, rows, _LANES), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((_BLOCKS, slots), lambda i: (i, 0)),
        out_shape=like(x, (count, slots), jnp.int32),
        scratch_shapes=[pltpu.VMEM((_BLOCKS, rows, _LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="block_top_k_indices",
        interpret=interpret,
    )(blocks)
    return indices[:, :k]


def _kernel(x_ref: Any, indices_ref: Any, ranks_ref: Any, *, k: int) -> None:
    bits = 8 * x_ref.dtype.itemsize - 1
    order = magnitude_order(x_ref[...]).astype(jnp.int32)
    row = lax.broadcasted_iota(jnp.int32, order.shape, 1)
    index = row * _LANES + lax.broadcasted_iota(jnp.int32, order.shape, 2)

    threshold = _bisect(bits, lambda t: _count(order >= t) >= k)
    above, tie = order > threshold, order == threshold
    need = k - _count(above)
    length = order.shape[1] * _LANES
    end = _bisect(length.bit_length(), lambda t: _count(tie & (index < t)) <= need)
    keep = above | (tie & (index < end))

    ranks_ref[...] = jnp.where(keep, _ranks(keep), 0)
    _place(ranks_ref, indices_ref)


def _count(mask: jax.Array) -> jax.Array:
    """The number of true entries of each block, shape (blocks, 1, 1)."""
    of_lanes = jnp.sum(mask.astype(jnp.int32), axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.sum(of_lanes, axis=2, keepdims=True, dtype=jnp.int32)


def _bisect(bits: int, holds: Any) -> jax.Array:
    """For each block, the largest integer of ``bits`` bits for which a falling predicate holds."""

    def probe(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(holds(higher), higher, found)

    return lax.fori_loop(0, bits, probe, jnp.zeros((_BLOCKS, 1, 1), jnp.int32))


def _ranks(keep: jax.Array) -> jax.Array:
    """1, 2, ... for the kept entries of each block in index order; for others, counts of kept."""
    blocks, rows, lanes = keep.shape
    kept = jnp.where(keep, 1.0, 0.0).reshape(blocks * rows, lanes)

    def ones(shape: tuple[int, int], where: Any) -> jax.Array:
        i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return jnp.where(where(i, j), 1.0, 0.0)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    within = product(kept, ones((lanes, lanes), lambda i, j: i <= j))
    # A row counts at most 128, which is exact in bfloat16.
    of_rows = product(kept, ones((lanes, lanes), lambda i, j: i >= 0))
    total = blocks * rows
    earlier = ones((total, total), lambda i, j: (i // rows == j // rows) & (j < i))
    ranks = within + product(earlier, of_rows)
    return ranks.astype(jnp.int32).reshape(keep.shape)


def _place(ranks_ref: Any, indices_ref: Any) -> None:
    """Writes, for each block, the index of the entry that belongs to each slot."""
    blocks, rows, lanes = ranks_ref.shape
    shape = (indices_ref.shape[1], lanes)
    rank = lax.broadcasted_iota(jnp.int32, shape, 0) + 1
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    ones = jnp.ones((_SUBLANES, lanes), jnp.float32)

    def over_lanes(small: jax.Array) -> jax.Array:
        """Sums over the lanes, put along lanes, of integers that are exact in bfloat16."""
        small = small.astype(jnp.float32)
        sums = lax.dot_general(
            ones, small, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return sums.astype(jnp.int32)

    def block(b: jax.Array, carry: jax.Array) -> jax.Array:
        def row(r: jax.Array, total: jax.Array) -> jax.Array:
            own = ranks_ref[b, pl.ds(r, 1), :] == rank
            return total + jnp.where(own, r * lanes + lane, 0)

        # One lane of each slot has its index; it is summed in two parts of six bits.
        found = lax.fori_loop(0, rows, row, jnp.zeros(shape, jnp.int32))
        indices = (over_lanes(found >> 6) << 6) + over_lanes(found & 63)
        indices_ref[pl.ds(b, 1), :] = indices[:1]
        return carry

    lax.fori_loop(0, blocks, block, jnp.int32(0))
