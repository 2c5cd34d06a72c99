"""Whether numbers are finite, found in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array, wide_dtype

_SMALL = 4096
"""Leaves of fewer elements are joined, which compiles faster than one sum per leaf."""


def all_finite(leaves: Sequence[Array], *, local: bool = False, squares: bool = False) -> Array:
    """Whether the sum of all numbers is finite, a boolean scalar; if so, every number is.

    A NaN or an infinity makes the sum NaN or infinite. Finite numbers can also do so, if they are
    close to the largest one; that is no loss, because the mean over workers is such a sum. Summing
    takes one pass that writes nothing. A sum of zero times each number would accept every finite
    number, but a compiler turns ``0 * (1e30 * x)`` into ``0 * x``, which hides that ``1e30 * x`` is
    infinite.

    Args:
      leaves: arrays; those that are not floating-point count as finite.
      local: whether each array lies on a single device. Small arrays are then joined; if they were
        split over devices, joining would gather them.
      squares: whether to sum the squares, which are finite if the norm of all numbers is at most
        the square root of the largest number: 1.8e19 in float32.

    >>> bool(all_finite([jnp.ones(2), jnp.zeros(0)])), bool(all_finite([jnp.array([1, jnp.inf])]))
    (True, False)
    >>> bool(all_finite([jnp.array([1e20])])), bool(all_finite([jnp.array([1e20])], squares=True))
    (True, False)
    """
    floats = [x for x in leaves if x.size and jnp.issubdtype(x.dtype, jnp.floating)]
    joined = [x for x in floats if local and x.size < _SMALL]
    alone = [x for x in floats if not (local and x.size < _SMALL)]
    for dtype in dict.fromkeys(x.dtype for x in joined):
        # Without the barrier the compiler splits the sum of the joined arrays into one per array.
        small = _end_to_end([x for x in joined if x.dtype == dtype])
        alone.append(lax.optimization_barrier(small))
    finite = jnp.ones((), bool)
    for dtype in dict.fromkeys(wide_dtype(x.dtype) for x in alone):
        wide = [lax.convert_element_type(x, dtype) for x in alone if wide_dtype(x.dtype) == dtype]
        total = _sum(_end_to_end([_sum(lax.mul(x, x) if squares else x) for x in wide]))
        # Without the barrier the sum is fused into each of the many kernels that select by it.
        finite = finite & lax.is_finite(lax.optimization_barrier(total))
    return finite


def all_of(flags: Sequence[Array]) -> Array:
    """Whether all of several boolean scalars are true.

    >>> bool(all_of([jnp.array(True), jnp.array(False)])), bool(all_of([]))
    (False, True)
    """
    if len(flags) < 2:
        return flags[0] if flags else jnp.ones((), bool)
    # A sort finds the minimum, because XLA fuses a reduction into each kernel that selects by it.
    # With 200 leaves, and one such kernel per leaf, the reduction took 7 more seconds to compile.
    return lax.sort(jnp.stack(flags).astype(jnp.int32))[0] > 0


def _sum(x: Array) -> Array:
    return lax.reduce(x, np.zeros((), x.dtype), lax.add, tuple(range(x.ndim)))


def _end_to_end(parts: Sequence[Array]) -> Array:
    vectors = [lax.reshape(x, (x.size,)) for x in parts]
    return vectors[0] if len(vectors) == 1 else lax.concatenate(vectors, 0)
