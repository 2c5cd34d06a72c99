"""Whether numbers are finite, found in one reading."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array, wide_dtype

_SMALL = 4096
"""Leaves of fewer elements are read as one: joining them compiles faster than a sum for each."""


def all_finite(leaves: Sequence[Array], *, local: bool = False) -> Array:
    """Whether every number is finite, a boolean scalar.

    Zero times a number is zero if it is finite and NaN otherwise, and so is the sum of these
    products: one pass that writes nothing, for which a CPU has a ready kernel.

    Args:
      leaves: arrays; those that are not floating-point are finite.
      local: whether each lies on one device as a whole. Small ones may then be joined; split ones
        would be gathered for that.

    >>> bool(all_finite([jnp.ones(2), jnp.zeros(0)])), bool(all_finite([jnp.array([1, jnp.inf])]))
    (True, False)
    """
    floats = [x for x in leaves if x.size and jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        return jnp.ones((), bool)
    joined = [x for x in floats if local and x.size < _SMALL]
    alone = [x for x in floats if not (local and x.size < _SMALL)]
    for dtype in dict.fromkeys(x.dtype for x in joined):
        alone.append(_end_to_end([x for x in joined if x.dtype == dtype]))
    total = _sum(_end_to_end([_sum_of_nothing(x) for x in alone]))
    # Without the barrier the sum is fused into each of the many kernels that choose by it.
    return lax.optimization_barrier(total) == 0


def all_of(verdicts: Sequence[Array]) -> Array:
    """Whether all of several boolean scalars are true.

    >>> bool(all_of([jnp.array(True), jnp.array(False)])), bool(all_of([]))
    (False, True)
    """
    if len(verdicts) < 2:
        return verdicts[0] if verdicts else jnp.ones((), bool)
    # The least by a sort: a reduction is fused into each kernel that chooses by it, and with a
    # kernel for each leaf that took seven seconds to compile where this takes none (200 leaves).
    return lax.sort(jnp.stack(verdicts).astype(jnp.int32))[0] > 0


def _sum_of_nothing(x: Array) -> Array:
    """The sum of 0 x, in float32."""
    wide = lax.convert_element_type(x, wide_dtype(x.dtype))
    return lax.convert_element_type(_sum(lax.mul(wide, lax.full_like(wide, 0))), jnp.float32)


def _sum(x: Array) -> Array:
    return lax.reduce(x, np.zeros((), x.dtype), lax.add, tuple(range(x.ndim)))


def _end_to_end(parts: Sequence[Array]) -> Array:
    vectors = [lax.reshape(x, (x.size,)) for x in parts]
    return vectors[0] if len(vectors) == 1 else lax.concatenate(vectors, 0)
