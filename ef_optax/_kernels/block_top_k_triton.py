"""Top-k of each block on GPU, in Triton: one program per block, which stays in registers.

A bisection on the bits of the magnitudes finds the k-th one by counting. One prefix sum then ranks
the entries above it and the first of its ties, which are stored to their slots.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ef_optax._kernels.dispatch import like
from ef_optax._numeric.magnitude import magnitude_order

_WARPS = 4
# One integer holds two counts, each below 2 to this power, since a block has fewer entries.
_SHIFT = 16


@functools.partial(jax.jit, static_argnames=("length", "k", "interpret", "warps"))
def block_top_k_indices(
    x: jax.Array, length: int, k: int, interpret: bool = False, warps: int = _WARPS
) -> jax.Array:
    """Indices in each block of its k largest magnitudes, ascending; ties go to the lowest index.

    Args:
      x: float32 or bfloat16 of shape (d,); entries after the last full block are not read.
      length: a power of two below ``2**16``.
      k: ``0 < k < length``.
      interpret: runs the kernel as JAX operations, on any backend.
      warps: number of warps of a program, with 32 threads each.

    Returns:
      int32 of shape (d // length, k).
    """
    count = x.size // length
    flat = pl.pallas_call(
        functools.partial(_kernel, length=length, k=k),
        grid=(count,),
        in_specs=[pl.BlockSpec((length,), lambda i: (i,))],
        # Slots are addressed by number, because k need not be a power of two.
        out_specs=pl.BlockSpec((count * k,), lambda i: (0,)),
        out_shape=like(x, (count * k,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name="block_top_k_indices",
        interpret=interpret,
    )(x)
    return flat.reshape(count, k)


def _kernel(x_ref: Any, indices_ref: Any, *, length: int, k: int) -> None:
    index = lax.iota(jnp.int32, length)
    x = plgpu.load(x_ref.at[index])
    bits = 8 * x.dtype.itemsize - 1
    order = magnitude_order(x).astype(jnp.int32)

    def undecided(state: tuple[jax.Array, ...]) -> jax.Array:
        bit, _, kept = state
        return (bit >= 0) & (kept != k)

    def probe(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Finds one more bit of the largest threshold that keeps at least k entries."""
        bit, threshold, kept = state
        higher = threshold | (jnp.int32(1) << bit)
        found = _count(order >= higher)
        enough = found >= k
        return bit - 1, jnp.where(enough, higher, threshold), jnp.where(enough, found, kept)

    start = (jnp.int32(bits - 1), jnp.int32(0), jnp.int32(length))
    _, threshold, _ = lax.while_loop(undecided, probe, start)

    above, tie = order > threshold, order == threshold
    one = jnp.where(above, jnp.int32(1), jnp.where(tie, jnp.int32(1 << _SHIFT), jnp.int32(0)))
    before = lax.cumsum(one)
    need = k - _count(above)
    ties = before >> _SHIFT
    slot = (before & ((1 << _SHIFT) - 1)) + jnp.minimum(ties, need) - 1
    keep = above | (tie & (ties <= need))
    first = pl.program_id(0) * k
    # Other entries are not stored; their slot is out of range, in case masks are not honoured.
    none = jnp.int32(indices_ref.shape[0])
    plgpu.store(indices_ref.at[jnp.where(keep, first + slot, none)], index, mask=keep)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask.astype(jnp.int32), dtype=jnp.int32)
