"""Memories that are stored as messages: any compressor of single leaves is a way to store one.

What a rule remembers of a leaf is encoded after a step and decoded before the next one. So the
compressors of this library are the storage formats, with their bits, their rounding and their
definitions: a cast, blocks of 8 or 4 bits, the largest values. What encoding loses is counted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.codec import Codec
from ef_optax._core.once import by_value, traced_once
from ef_optax._core.workers import Workers
from ef_optax._exchange import slices
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.linear import einsum


class Kept(abc.ABC):
    """One leaf of a memory in a form other than an array; subclasses are pytree nodes."""

    @abc.abstractmethod
    def wide(self) -> Array:
        """What is remembered, in float32 or wider."""

    @abc.abstractmethod
    def replaced(self, value: Array, step: Array, worker: Array) -> Kept:
        """Another value in the same form.

        Args:
          value: what is to be remembered.
          step: exchanges made so far, an int32 scalar, for rounding with fresh noise.
          worker: the index of this worker; 0 on all of them if they must keep the same.
        """

    def mixed(self, weights: np.ndarray) -> Kept:
        """For a memory with a leading worker axis: ``new_j = sum_i weights[j, i] old_i``."""
        raise NotImplementedError(f"{type(self).__name__} cannot change the number of workers.")


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What is static about a stored leaf.

    Attributes:
      codec: how it is encoded.
      path: the leaf's name.
      like: shape and dtype of what one device decodes: of the leaf, or of its slice if it is split
        over model axes.
      sliced: whether the leaf is split; then all arrays have a leading axis of slices.
    """

    codec: Codec
    path: str
    like: jax.ShapeDtypeStruct
    sliced: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @functools.cached_property
    def _identity(self) -> Any:
        """Equal for equal hyper-parameters; concrete keys count by value, unlike in a trace."""
        return by_value(self.codec), self.path, self.like.shape, self.like.dtype, self.sliced

    def encode(
        self, value: Array, step: Any, worker: Any, slice_index: Any = 0
    ) -> tuple[Any, Array]:
        """The message of one device's value, and the 1-norm of what it loses."""
        path = np.uint32(zlib.crc32(self.path.encode()))
        workers = Workers(1, worker, step, path, slice_index)
        x = value.astype(self.like.dtype)
        message = traced_once(self.codec.encode, x, self.codec.step_key(workers))
        lost = jnp.sum(jnp.abs(traced_once(self.codec.residual, x, message)))
        return message, lost.astype(jnp.float32)

    def decode(self, message: Any) -> Array:
        return traced_once(self.codec.decode, message, self.like)

    def zeros(self, count: int | None) -> Stored:
        """Zeros in this form, for one device or for ``count`` slices."""
        nothing = jnp.zeros(self.like.shape, self.like.dtype)
        message, lost = self.encode(nothing, jnp.zeros((), jnp.int32), 0)
        if count is not None:
            message, lost = jax.tree.map(lambda x: jnp.stack([x] * count), (message, lost))
        return Stored(message, lost, self)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["message", "lost"], meta_fields=["form"]
)
@dataclasses.dataclass(frozen=True)
class Stored(Kept):
    """One leaf of a memory as the message of a codec.

    Attributes:
      message: what the codec encodes.
      lost: float32 scalar: the sum over all steps of the 1-norm of what encoding lost.
      form: everything static.
    """

    message: Any
    lost: Array
    form: Form

    def wide(self) -> Array:
        form = self.form
        if self.lost.ndim > form.sliced:  # an axis of workers, outside of the map over them
            return jax.vmap(Stored.wide)(self)
        if not form.sliced:
            return form.decode(self.message)

        def read(_: Array, message: Any, shared: Any, index: Any) -> tuple[dict[str, Array], Any]:
            del shared, index
            return {"value": form.decode(message)}, ()

        out, _ = self._on_slices(read, None, self.message, (), ["value"])
        return out["value"]

    def replaced(self, value: Array, step: Array, worker: Array) -> Stored:
        form = self.form

        def write(x: Array, lost: Array, shared: Any, index: Any) -> tuple[dict[str, Array], Any]:
            message, more = form.encode(x, shared[0], shared[1], index)
            return {}, (message, lost + more)

        shared = step, worker
        if form.sliced:
            _, (message, lost) = self._on_slices(write, value, self.lost, shared, [])
        else:
            _, (message, lost) = write(value, self.lost, shared, 0)
        return Stored(message, lost, form)

    def mixed(self, weights: np.ndarray) -> Stored:
        form, step = self.form, jnp.zeros((), jnp.int32)
        workers = jnp.arange(len(weights), dtype=jnp.uint32)
        decode = jax.vmap(form.decode)
        encode = jax.vmap(lambda x, worker: form.encode(x, step, worker))
        if form.sliced:
            numbers = jnp.arange(self.lost.shape[1], dtype=jnp.uint32)
            each = jax.vmap(form.encode, (0, None, None, 0))
            decode = jax.vmap(decode)
            encode = jax.vmap(lambda x, worker: each(x, step, worker, numbers))

        def mix(x: Array) -> Array:
            return einsum("mn,n...->m...", jnp.asarray(weights, x.dtype), x)

        message, more = encode(mix(decode(self.message)), workers)
        return Stored(message, mix(self.lost) + more, form)

    def _on_slices(
        self, run: Callable[..., Any], value: Array | None, state: Any, shared: Any, names: Any
    ) -> tuple[dict[str, Array], Any]:
        """``run(slice of value, its state, shared, its index)`` on all slices: arrays and state."""
        form = self.form
        specs = slices.leaf_specs([form.path])
        if specs is None:
            raise ValueError(
                f"the memory of {form.path!r} is split over model axes, so only the lifted "
                "transformation that made it can read it."
            )
        if value is None:  # only its shape matters
            value = jnp.zeros(slices.whole_shape(form.like.shape, specs[0]), form.like.dtype)

        def send(leaves: Any, states: Any, shared: Any, indices: Any) -> Any:
            out, after = run(leaves[0], states[0], shared, indices[0])
            return {name: [x] for name, x in out.items()}, ([after], ())

        out, (after, _) = slices.over_slices(send, [value], [state], shared, specs, names)
        return {name: xs[0] for name, xs in out.items()}, after[0]
