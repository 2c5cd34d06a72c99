"""Where a piece lies, as data: pieces of equal size are then cut out by one and the same program.

A compiler makes one kernel for every slice with other constants in it, so taking a buffer apart
into the leaves of a model is most of what there is to compile. With the positions as arrays the
slices of equal size are the same program, and XLA compiles it once.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

Array = jax.Array


def as_data(values: Sequence[int], witness: Array) -> Sequence[Array | int]:
    """The integers as int32 scalars that the compiler does not know.

    They come out of a condition that holds for every value of the witness, which no simplification
    sees: results of a condition are buffers of their own, and kernels are not specialised to them.

    Args:
      values: non-negative integers below ``2**31``.
      witness: any integer scalar that is computed at run time. The results vary over the mesh, and
        over a ``vmap``, as it does. If it is known, nothing is being compiled as a whole, and the
        integers are returned as they are.
    """
    if not isinstance(witness, Tracer):
        return values
    always = (witness | 1) != 0
    return jax.lax.cond(
        always,
        lambda: [jnp.asarray(v, jnp.int32) for v in values],
        lambda: [jnp.asarray(0, jnp.int32) for _ in values],
    )


def starts(
    sizes: Sequence[int], kinds: Sequence[Hashable], witness: Array | None
) -> list[Array | int]:
    """Where pieces of the given sizes begin that lie one after the other.

    The starts of pieces of the same kind are data, if there is a witness; those of single pieces
    are Python integers, as nothing can be shared.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    where: list[Array | int] = list(ends[:-1])
    count = collections.Counter(kinds)
    shared = [i for i, kind in enumerate(kinds) if count[kind] > 1 and sizes[i]]
    if witness is not None and shared and ends[-1] < 1 << 31:
        for i, start in zip(shared, as_data([ends[i] for i in shared], witness), strict=True):
            where[i] = start
    return where
