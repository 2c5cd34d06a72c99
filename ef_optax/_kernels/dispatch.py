"""The choice between a kernel and the XLA form, which the platform decides at lowering."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._bits import packing
from ef_optax._select import blocks as block_select

# Below this size a launch costs more than a kernel saves, and equal leaves are stacked.
MIN_SIZE = 1 << 16
# Entries are numbered in int32.
_MAX_SIZE = (1 << 31) - (1 << 20)
_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
# A block of these lengths fits in the registers of a program (GPU) and consists of tiles (TPU).
_LENGTHS = (2048, 4096)
# On TPU every slot is compared with all entries of the block, so for more slots the XLA form is
# cheaper.
_TPU_MAX_K = 256


@jax.custom_jvp
def pack_signs_and_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`ef_optax._bits.packing.pack_signs_and_norm`, by a kernel on GPU and TPU if one fits.

    The kernels are for float32 and bfloat16 with at least `MIN_SIZE` entries. The words are the
    same to the bit, and the norm is the same up to the rounding of its sum.

    Args:
      x: floating array of shape (count,).

    Returns:
      The words of `ef_optax._bits.packing.pack_signs`, and the 1-norm as a scalar in float32, or in
      the dtype of x if that is wider.

    Example:
      >>> words, norm = pack_signs_and_norm(jnp.array([1.0, -2.0, 0.5]))
      >>> words.tolist(), norm.item()
      ([5], 3.5)
    """
    if not _fits(x):
        return packing.pack_signs_and_norm(x)
    kernels = _kernels("signs", "pack_signs_and_norm")
    return lax.platform_dependent(x, default=packing.pack_signs_and_norm, **kernels)


@pack_signs_and_norm.defjvp
def _pack_signs_and_norm_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The derivative, which neither a kernel nor the one-pass XLA form has."""
    (x,), (dx,) = primals, tangents
    words, norm = pack_signs_and_norm(x)
    change = jnp.sum(jnp.sign(x).astype(norm.dtype) * dx.astype(norm.dtype))
    return (words, norm), (np.zeros(words.shape, jax.dtypes.float0), change)


def block_top_k_indices(x: jax.Array, length: int, k: int) -> jax.Array:
    """`ef_optax._select.blocks.block_top_k_indices`, by a kernel on GPU and TPU if one fits.

    The kernels are for float32 and bfloat16 with at least `MIN_SIZE` entries, blocks of 2048 or
    4096, and ``0 < k < length`` (on TPU k up to 256). The indices are the same.

    Args:
      x: floating array of shape (d,). Entries after the last full block are not read.
      length: static length of a block.
      k: static number of entries of each block, ``0 <= k <= length``.

    Returns:
      int32 of shape (d // length, k), ascending in each block; ties go to the lowest index.

    Raises:
      ValueError: if ``k`` is not in ``0 ... length`` or ``x`` is not one-dimensional.

    Example:
      >>> block_top_k_indices(jnp.array([1.0, -3.0, 2.0, 0.0, 0.0, -1.0]), 3, 2).tolist()
      [[1, 2], [0, 2]]
    """

    def xla(x: jax.Array) -> jax.Array:
        return block_select.block_top_k_indices(x, length, k)

    if x.ndim != 1 or not _fits(x) or length not in _LENGTHS or not 0 < k < length:
        return xla(x)
    kernels = _kernels("block_top_k", "block_top_k_indices")
    if k > _TPU_MAX_K:
        kernels.pop("tpu", None)
    chosen = {name: partial(kernel, length=length, k=k) for name, kernel in kernels.items()}
    # Indices have no derivative, and the kernels must not be asked for one.
    return lax.platform_dependent(lax.stop_gradient(x), default=xla, **chosen)


def _fits(x: jax.Array) -> bool:
    # The kernels count in 32 bits, but with jax_enable_x64 Python's integers have 64.
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return x.dtype in _DTYPES and MIN_SIZE <= x.size <= _MAX_SIZE


def _kernels(step: str, function: str) -> dict[str, Callable[..., Any]]:
    """The kernels of a step by platform, for the backends that this version of JAX has.

    The first leaf that is large enough imports Pallas; the library does not.
    """
    found = {}
    for platform, backend in (("cuda", "triton"), ("tpu", "tpu")):
        if importlib.util.find_spec(f"jax.experimental.pallas.{backend}") is not None:
            module = importlib.import_module(f"ef_optax._kernels.{step}_{backend}")
            found[platform] = getattr(module, function)
    return found


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output, which varies over the mesh as ``x`` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
