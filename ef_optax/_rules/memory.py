"""The memories of a rule: how they begin, how they are read, how they are stored.

A rule computes in float32, or in a wider dtype if its gradients have one. What it remembers from
step to step (residuals, estimates, momenta) passes through a :class:`Memory` in both directions.
So every rule has the same option ``memory``, and no rule knows how its memories are stored.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import FLOATING_ONLY, Array, wide_dtype


class Kept(abc.ABC):
    """One leaf of a memory in a form other than an array; subclasses are pytree nodes."""

    @abc.abstractmethod
    def wide(self) -> Array:
        """What is remembered, in float32 or wider."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memories stored as plain arrays of one dtype.

    Rules call these three methods and nothing else. Another way to store memories (stochastic
    rounding, blocks of 8 bits) is a subclass with its own ``zeros`` and ``write``, whose leaves are
    arrays or :class:`Kept`.

    Attributes:
      dtype: the dtype of all memories; None for float32, or the parameters' own if it is wider.
      axis_name: the worker axis, for a subclass whose rounding noise differs between the workers.
    """

    dtype: DTypeLike | None = None
    axis_name: AxisName = None

    def zeros(self, params: Any) -> Any:
        """A memory like ``params`` before the first step.

        Every call makes new buffers, so that a state may be donated.
        """

        def zero(path: Any, p: Any) -> Array:
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                name = f"params{jax.tree_util.keystr(path)}"
                raise TypeError(f"{name} has dtype {jnp.result_type(p)}, {FLOATING_ONLY}")
            dtype = wide_dtype(jnp.result_type(p)) if self.dtype is None else self.dtype
            return jnp.zeros_like(p, dtype)

        return jax.tree_util.tree_map_with_path(zero, params)

    @staticmethod
    def read(kept: Any) -> Any:
        """What is remembered, in float32 or wider.

        It needs nothing but the stored form, so the ``points`` of a State class can call it too.
        """
        is_kept = lambda x: isinstance(x, Kept)  # noqa: E731
        wide = lambda x: x.wide() if is_kept(x) else trees.wide(x)  # noqa: E731
        return jax.tree.map(wide, kept, is_leaf=is_kept)

    def write(self, value: Any, kept: Any, step: Array, *, shared: bool = False) -> Any:
        """The form in which ``value`` is stored until the next step.

        Args:
          value: the rule's new memory, as computed.
          kept: the old one, in its stored form.
          step: exchanges made so far, an int32 scalar, for rounding with fresh noise.
          shared: whether all workers hold the same ``value`` and must keep the same.
        """
        del step, shared
        return jax.tree.map(lambda x, old: x.astype(old.dtype), value, kept)


MemoryLike = Memory | DTypeLike | None
"""What the option ``memory`` of a rule may be."""


def memory_for(memory: MemoryLike, axis_name: AxisName = None) -> Memory:
    """The memory of a rule from its option.

    Args:
      memory: None, a floating-point dtype, or a :class:`Memory`.
      axis_name: the worker axis, or None.

    Raises:
      ValueError: for anything else.

    Example:
      >>> kept = memory_for("bfloat16").zeros(jnp.ones(3))
      >>> kept.dtype, Memory.read(kept).dtype
      (dtype(bfloat16), dtype('float32'))
    """
    if isinstance(memory, Memory):
        return dataclasses.replace(memory, axis_name=axis_name)
    if memory is None:
        return Memory(axis_name=axis_name)
    try:
        dtype = jnp.dtype(memory)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"memory={memory!r} must be a floating-point dtype such as 'bfloat16', or None for "
            "float32."
        )
    return Memory(dtype, axis_name)
