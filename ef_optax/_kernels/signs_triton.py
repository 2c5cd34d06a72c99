"""Packed signs and 1-norm on GPU in one pass, in Triton.

A program reads a tile of values as rows of 32, and packs each row into a word, which is a sum of
disjoint bits. Each program stores one partial norm, and XLA adds these.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ef_optax._bits.packing import WORD_BITS, packed_words
from ef_optax._kernels.dispatch import like

# Words per program: 4096 values, 32 for each thread.
_WORDS = 128
_WARPS = 4


@functools.partial(jax.jit, static_argnames=("interpret", "warps"))
def pack_signs_and_norm(
    x: jax.Array, interpret: bool = False, warps: int = _WARPS
) -> tuple[jax.Array, jax.Array]:
    """Words and norm of a float32 or bfloat16 vector.

    Args:
      x: shape (count,), at least one entry.
      interpret: runs the kernel as JAX operations, on any backend.
      warps: number of warps of a program, with 32 threads each.

    Returns:
      uint32 words, and the norm in float32.
    """
    words = packed_words(x.size, 1)
    programs = pl.cdiv(words, _WORDS)
    packed, norms = pl.pallas_call(
        functools.partial(_kernel, size=x.size),
        grid=(programs,),
        in_specs=[pl.BlockSpec((_WORDS * WORD_BITS,), lambda i: (i,))],
        out_specs=[pl.BlockSpec((_WORDS,), lambda i: (i,)), pl.BlockSpec((1,), lambda i: (i,))],
        out_shape=[like(x, (words,), jnp.uint32), like(x, (programs,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        name="pack_signs_and_norm",
        interpret=interpret,
    )(x)
    return packed, jnp.sum(norms)


def _kernel(x_ref: Any, words_ref: Any, norms_ref: Any, *, size: int) -> None:
    shape = (_WORDS, WORD_BITS)
    bit = lax.broadcasted_iota(jnp.int32, shape, 1)
    word = lax.broadcasted_iota(jnp.int32, shape, 0)
    offset = word * WORD_BITS + bit
    start = pl.program_id(0) * (_WORDS * WORD_BITS)
    ragged = size % (_WORDS * WORD_BITS) != 0
    if ragged:
        # Slots of the last tile beyond the vector get no sign bit and add nothing to the norm.
        real = start + offset < size
        x = plgpu.load(x_ref.at[offset], mask=real, other=0.0)
        plus = (x >= 0) & real
    else:
        x = plgpu.load(x_ref.at[offset])
        plus = x >= 0
    bits = jnp.where(plus, jnp.int32(1) << bit, jnp.int32(0))
    words = lax.bitcast_convert_type(jnp.sum(bits, axis=1, dtype=jnp.int32), jnp.uint32)
    row = lax.iota(jnp.int32, _WORDS)
    inside = start // WORD_BITS + row < packed_words(size, 1) if ragged else None
    plgpu.store(words_ref.at[row], words, mask=inside)
    norms_ref[0] = jnp.sum(jnp.abs(x.astype(jnp.float32)))
