"""The memories of a rule: how they begin, how they are read, how they are stored.

A rule computes in float32, or in a wider dtype if its gradients have one. What it remembers from
step to step (residuals, estimates, momenta) passes through a :class:`Memory` in both directions.
So every rule has the same option ``memory``, and no rule knows how its memories are stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ef_optax._core import context
from ef_optax._core.codec import Codec
from ef_optax._core.need import SELF_CONTAINED
from ef_optax._core.policy import LeafPolicy, for_leaf
from ef_optax._exchange import collectives as coll
from ef_optax._exchange import slices
from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import FLOATING_ONLY, Array, bits_of, wide_dtype
from ef_optax._rules.resting import require_host_memory
from ef_optax._rules.stored import Form, Kept
from ef_optax.compressors.combine.identity import Identity
from ef_optax.compressors.compressor import Compressor, codec_of
from ef_optax.compressors.quantize.cast import Cast


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memories stored as arrays of one dtype, or as the messages of a codec.

    Rules call these three methods and nothing else.

    Attributes:
      dtype: the dtype of all memories; None for float32, or the parameters' own if it is wider.
      axis_name: the worker axis, for rounding noise that differs between the workers.
      codec: encodes the memory of each leaf; None for plain arrays.
      host: whether the memory is in the host's memory between two steps.
    """

    dtype: DTypeLike | None = None
    axis_name: AxisName = None
    codec: Codec | None = None
    host: bool = False

    def zeros(self, params: Any) -> Any:
        """A memory like ``params`` before the first step.

        Every call makes new buffers, so that a state may be donated.
        """

        def zero(path: Any, p: Any) -> Any:
            name = context.path_string(path)
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                where = f"params{jax.tree_util.keystr(path)}"
                raise TypeError(f"{where} has dtype {jnp.result_type(p)}, {FLOATING_ONLY}")
            wide = wide_dtype(jnp.result_type(p))
            dtype = jnp.dtype(wide if self.dtype is None else self.dtype)
            codec = None if self.codec is None else for_leaf(self.codec, name, _like(p, dtype))
            if self.host and codec is None:
                narrow = bits_of(dtype) < bits_of(wide)
                codec, dtype = (Cast(dtype.name), wide) if narrow else (Identity(), dtype)
            if codec is None or (isinstance(codec, Identity) and not self.host):
                return jnp.zeros_like(p, dtype)
            return _coded_zeros(codec, name, _like(p, dtype), self.host)

        if self.host:
            require_host_memory()
        return jax.tree_util.tree_map_with_path(zero, params)

    @staticmethod
    def read(kept: Any) -> Any:
        """What is remembered, in float32 or wider.

        It needs nothing but the stored form, so the ``points`` of a State class can call it too.
        """
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
        axis = None if shared else self.axis_name

        def one(old: Any, x: Array) -> Any:
            if is_kept(old):
                return old.replaced(x, step, jnp.asarray(coll.axis_index(axis), jnp.uint32))
            return x.astype(old.dtype)

        return jax.tree.map(one, kept, value, is_leaf=is_kept)


def is_kept(x: Any) -> bool:
    """For ``is_leaf``: whether this is a leaf of a memory that is not an array."""
    return isinstance(x, Kept)


def _like(p: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(p), jnp.dtype(dtype))


def _coded_zeros(codec: Codec, path: str, like: jax.ShapeDtypeStruct, host: bool) -> Kept:
    """Zeros in the form of a codec, which is checked; a split leaf has a message for each slice."""
    SELF_CONTAINED.check(f"memory, at {path!r},", codec)
    specs, count = slices.leaf_specs([path]), None
    if specs is not None and context.spec_axes(specs[0]):
        like, count = slices.slice_like(like, specs[0]), slices.slice_count(specs[0])
    error = codec.noise_error(like.shape)
    if error >= 1:
        raise ValueError(
            f"memory, at {path!r}, {codec.name} makes a squared error of {error:.3g} times the "
            f"memory of shape {like.shape} at every step; choose a format that keeps more of it, "
            "such as ef_optax.block_quantize(8, key=0)."
        )
    return Form(codec, path, like, count is not None, host).zeros(count)


MemoryLike = Memory | Compressor | DTypeLike | None
"""What the option ``memory`` of a rule may be."""


def memory_for(memory: MemoryLike, axis_name: AxisName = None) -> Memory:
    """The memory of a rule from its option.

    Args:
      memory: None, a floating-point dtype, a compressor that encodes it, or a :class:`Memory`, such
        as ``ef_optax.on_host()``.
      axis_name: the worker axis, or None.

    Raises:
      ValueError: for anything else, and for a compressor that one worker cannot decode alone.

    Example:
      >>> kept = memory_for("bfloat16").zeros(jnp.ones(3))
      >>> kept.dtype, Memory.read(kept).dtype
      (dtype(bfloat16), dtype('float32'))
      >>> from ef_optax import block_quantize
      >>> kept = memory_for(block_quantize(8, key=0)).zeros(jnp.ones(3))
      >>> Memory.read(kept).tolist()
      [0.0, 0.0, 0.0]
    """
    if isinstance(memory, Memory):
        return dataclasses.replace(memory, axis_name=axis_name)
    if memory is None:
        return Memory(axis_name=axis_name)
    if isinstance(memory, Compressor):
        codec = codec_of(memory)
        if not isinstance(codec, LeafPolicy):  # what it chooses is checked when a state is made
            SELF_CONTAINED.check("memory:", codec)
        return Memory(axis_name=axis_name, codec=codec)
    try:
        dtype = jnp.dtype(memory)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"memory={memory!r} must be a floating-point dtype such as 'bfloat16', a compressor "
            "such as ef_optax.block_quantize(8, key=0), or None for float32."
        )
    return Memory(dtype, axis_name)
