"""Packed signs and 1-norm on GPU: one reading, in Triton.

A program takes a tile of values as rows of 32, one row a word. Words are sums of bits that do not
overlap; each program leaves one partial norm, and XLA adds those.
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

# Words of one program: 4096 values, 32 a thread.
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
      warps: of 32 threads, of one program.

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
    place = word * WORD_BITS + bit
    start = pl.program_id(0) * (_WORDS * WORD_BITS)
    ragged = size % (_WORDS * WORD_BITS) != 0
    if ragged:
        # What the last tile has too many gets no sign bit and adds nothing to the norm.
        real = start + place < size
        x = plgpu.load(x_ref.at[place], mask=real, other=0.0)
        plus = (x >= 0) & real
    else:
        x = plgpu.load(x_ref.at[place])
        plus = x >= 0
    bits = jnp.where(plus, jnp.int32(1) << bit, jnp.int32(0))
    words = lax.bitcast_convert_type(jnp.sum(bits, axis=1, dtype=jnp.int32), jnp.uint32)
    row = lax.iota(jnp.int32, _WORDS)
    inside = start // WORD_BITS + row < packed_words(size, 1) if ragged else None
    plgpu.store(words_ref.at[row], words, mask=inside)
    norms_ref[0] = jnp.sum(jnp.abs(x.astype(jnp.float32)))
