"""Bits of one worker's message for a whole tree."""

from __future__ import annotations

from typing import Any

import jax

from ef_optax._core.context import path_string
from ef_optax._core.policy import for_leaf
from ef_optax._numeric.dtypes import wide_dtype
from ef_optax._numeric.shapes import like_of
from ef_optax.compressors.compressor import Compressor, codec_of


def message_bits(compressor: Compressor, params: Any, dtype: Any = None) -> int:
    """Bits of one worker's message for a whole tree: the sum of its leaves' ``codec.bits``.

    Args:
      compressor: any compressor, :func:`per_leaf` included.
      params: a tree of arrays or ShapeDtypeStructs.
      dtype: dtype of the compressed values; by default float32, or the leaf's own if it is wider.

    Returns:
      The number of bits, before rounding up to a word and without the two header words of a step.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.message_bits(ef.scaled_sign(), {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)})
      136
    """
    codec, total = codec_of(compressor), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wide = wide_dtype(leaf.dtype) if dtype is None else dtype
        total += for_leaf(codec, path_string(path), like_of(leaf)).bits(leaf.shape, wide)
    return total
