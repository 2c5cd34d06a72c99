"""Packed signs and 1-norm on TPU in one pass, in which the matrix unit packs the signs.

Values are in rows of 128 lanes, so 32 rows make one row of 128 words. A product with a matrix of
powers of two sums the bits of each half word, and puts the four words of a row into *all* groups of
four lanes. Each row keeps only its own group, so the sum over the 32 rows has the words in order,
without a transposition. Bits and powers are exact in bfloat16, to which the unit may round its
operands, and sums of 16 bits are exact in float32. The operands are float32, which every TPU
generation accepts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ef_optax._bits.packing import WORD_BITS, packed_words
from ef_optax._kernels.dispatch import like

_LANES = 128
_ROWS = WORD_BITS  # rows of values that make one row of words
_WORDS_OF_ROW = _LANES // WORD_BITS
_HALF = 16
# Rows of words per program.
_GROUPS = 32


@functools.partial(jax.jit, static_argnames=("interpret",))
def pack_signs_and_norm(x: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Words and norm of a float32 or bfloat16 vector.

    A vector whose length is not a multiple of 128 is padded first, which copies it.

    Args:
      x: shape (count,), at least one entry.
      interpret: runs the kernel as JAX operations, on any backend.

    Returns:
      uint32 words, and the norm in float32.
    """
    size = x.size
    rows = pl.cdiv(size, _LANES)
    values = jnp.pad(x, (0, rows * _LANES - size)).reshape(rows, _LANES)
    tile = _GROUPS * _ROWS
    programs = pl.cdiv(rows, tile)
    words, norms = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(programs,),
        in_specs=[pl.BlockSpec((tile, _LANES), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((_GROUPS, _LANES), lambda i: (i, 0)),
            pl.BlockSpec((1, 1, _LANES), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            like(x, (pl.cdiv(rows, _ROWS), _LANES), jnp.int32),
            like(x, (programs, 1, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="pack_signs_and_norm",
        interpret=interpret,
    )(values)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(-1)
    return words[: packed_words(size, 1)], jnp.sum(norms)


def _kernel(x_ref: Any, words_ref: Any, norms_ref: Any, *, size: int) -> None:
    x = x_ref[...].astype(jnp.float32)
    plus, magnitude = x >= 0, jnp.abs(x)
    if size % x.size:
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + pl.program_id(0) * x.shape[0]
        real = row * _LANES + lax.broadcasted_iota(jnp.int32, x.shape, 1) < size
        plus, magnitude = plus & real, jnp.where(real, magnitude, 0.0)
    norms_ref[0] = jnp.sum(magnitude, axis=0, keepdims=True)

    bits = jnp.where(plus, 1.0, 0.0)
    lane = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
    word = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)
    own = lane // WORD_BITS == word % _WORDS_OF_ROW
    power = jnp.where(own, jnp.int32(1) << (lane % _HALF), 0)
    low = lane % WORD_BITS < _HALF

    def half(chosen: jax.Array) -> jax.Array:
        weights = jnp.where(chosen, power, 0).astype(jnp.float32)
        sums = jnp.dot(bits, weights, preferred_element_type=jnp.float32)
        sums = sums.reshape(-1, _ROWS, _LANES)
        row = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
        group = lax.broadcasted_iota(jnp.int32, sums.shape, 2) // _WORDS_OF_ROW
        return jnp.sum(jnp.where(row == group, sums, 0.0), axis=1).astype(jnp.int32)

    words_ref[...] = half(low) | half(~low) << _HALF
