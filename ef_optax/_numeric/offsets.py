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
    Only so on a CPU: elsewhere the host may have to wait for a condition, and they stay constants.

    Args:
      values: non-negative integers below ``2**31``.
      witness: any integer scalar that is computed at run time. The results vary over the mesh, and
        over a ``vmap``, as it does. If it is known, nothing is being compiled as a whole, and the
        integers are returned as they are.
    """
    if not isinstance(witness, Tracer):
        return values
    typed = (witness & 0).astype(jnp.int32)

    def known() -> list[Array]:
        return [typed + v for v in values]

    def hidden() -> list[Array]:
        always = (witness | 1) != 0
        constants = jax.lax.cond(
            always,
            lambda: [jnp.int32(v) for v in values],
            lambda: [jnp.int32(0) for _ in values],
        )
        return [typed + v for v in constants]

    return jax.lax.platform_dependent(cpu=hidden, default=known)


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
