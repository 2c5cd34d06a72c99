"""Results in buffers of their own, where a compiler would compute them again in every loop.

XLA:CPU fuses cheap work into each loop that reads its result: the mean of the messages of eight
workers was decoded once for each moment of Adam. The results of a condition are buffers of their
own, so work in a branch is done once, and nothing is specialised to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def in_buffers(work: Callable[[], Any], runtime: jax.Array) -> Any:
    """The result of ``work``, computed once and kept in memory.

    On a CPU it is the result of a condition that is true for every value of ``runtime``, which no
    simplification finds out. Elsewhere the host may have to wait for a condition, so ``work`` is
    called as it is.

    Args:
      work: makes a tree of arrays, without collectives; traced as often as it takes to know the
        shapes, so it should be cheap to trace (``traced_once``).
      runtime: any integer scalar that is computed at run time and is equal on all devices. Where a
        ``vmap`` gives each of its rows another one, the condition becomes a choice, and the result
        may be computed more than once.

    Returns:
      The tree.

    >>> int(jax.jit(lambda x, step: in_buffers(lambda: x + 1, step))(2, 0))
    3
    """
    if not isinstance(runtime, Tracer):
        return work()

    def kept() -> Any:
        always = (runtime | 1) != 0
        return jax.lax.cond(always, work, lambda: jax.tree.map(_zeros_like, jax.eval_shape(work)))

    return jax.lax.platform_dependent(cpu=kept, default=work)


def _zeros_like(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of the type of ``x``: where types tell what differs between devices, so must these."""
    zeros = jnp.zeros(x.shape, x.dtype)
    kind = x.manual_axis_type  # None outside of a map
    names = tuple(kind.varying) if kind else ()
    return jax.lax.pcast(zeros, names, to="varying") if names else zeros
