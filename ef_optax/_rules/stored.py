"""Memories that are stored as messages: any compressor of single leaves is a way to store one.

What a rule remembers of a leaf is encoded after a step and decoded before the next one. So the
compressors of this library are the storage formats, with their bits, their rounding and their
definitions: a cast, blocks of 8 or 4 bits, the largest values. What encoding loses is counted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
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
from ef_optax.compressors.combine.identity import Identity

_ON_HOST = (1,) * 8
"""How the shape of an array on the host begins, after the axes of workers and slices."""


@functools.partial(jax.jit, inline=True)  # outside of a program too, so that no step compiles again
def to_host(x: Array) -> Array:
    """The array in the host's memory."""
    return jax.device_put(x, jax.memory.Space.Host)


@functools.partial(jax.jit, inline=True)
def _to_device(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Device)


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
      host: whether messages are in the host's memory between two steps (see ``resting``).
    """

    codec: Codec
    path: str
    like: jax.ShapeDtypeStruct
    sliced: bool
    host: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @functools.cached_property
    def _identity(self) -> Any:
        """Equal for equal hyper-parameters; concrete keys count by value, unlike in a trace."""
        like = self.like.shape, self.like.dtype
        return by_value(self.codec), self.path, like, self.sliced, self.host

    @functools.cached_property
    def message_like(self) -> Any:
        """Shapes and dtypes of the message of one device's value."""
        nothing = jnp.zeros(self.like.shape, self.like.dtype)
        return jax.eval_shape(lambda: self.encode(nothing, jnp.zeros((), jnp.int32), 0)[0])

    def encode(self, value: Array, step: Any, worker: Any, slice_index: Any = 0) -> tuple[Any, Any]:
        """The message of one device's value, and the 1-norm of what it loses; () if it cannot."""
        path = np.uint32(zlib.crc32(self.path.encode()))
        workers = Workers(1, worker, step, path, slice_index)
        x = value.astype(self.like.dtype)
        message = traced_once(self.codec.encode, x, self.codec.step_key(workers))
        if isinstance(self.codec, Identity):
            return message, ()
        lost = jnp.sum(jnp.abs(traced_once(self.codec.residual, x, message)))
        return message, lost.astype(jnp.float32)

    def decode(self, message: Any) -> Array:
        return traced_once(self.codec.decode, message, self.like)

    def zeros(self, count: int | None) -> Stored:
        """Zeros in this form, for one device or for ``count`` slices."""
        # Without the barrier the compiler encodes the zeros itself, a second for each 0.1 million.
        nothing = jax.lax.optimization_barrier(jnp.zeros(self.like.shape, self.like.dtype))
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
      lost: float32 scalar: the sum over all steps of the 1-norm of what encoding lost; () if
        values are stored as they are.
      form: everything static.
    """

    message: Any
    lost: Any
    form: Form

    def wide(self) -> Array:
        form = self.form
        if not form.like.size:  # parts of its message are the same on all workers
            return jnp.zeros(form.like.shape, form.like.dtype)
        if self._of_workers:  # outside of the map over them
            return jax.vmap(Stored.wide)(self)
        self = self.fetched()
        if not form.sliced:
            return form.decode(self.message)

        def read(_: Array, message: Any, shared: Any, index: Any) -> tuple[dict[str, Array], Any]:
            del shared, index
            return {"value": form.decode(message)}, ()

        out, _ = self._on_slices(read, None, self.message, (), ["value"])
        return out["value"]

    def replaced(self, value: Array, step: Array, worker: Array) -> Stored:
        form = self.form

        def write(x: Array, lost: Any, shared: Any, index: Any) -> tuple[dict[str, Array], Any]:
            message, more = form.encode(x, shared[0], shared[1], index)
            return {}, (message, jax.tree.map(jnp.add, lost, more))

        shared = step, worker
        if form.sliced:
            _, (message, lost) = self._on_slices(write, value, self.lost, shared, [])
        else:
            _, (message, lost) = write(value, self.lost, shared, 0)
        return Stored(message, lost, form)

    # JAX pairs donated buffers with results by shape and dtype alone. So an array on the host has a
    # shape that no array on the device has; else a process that donates its state would abort.

    def fetched(self) -> Stored:
        """The same in the device's memory, where it can be computed with."""

        def one(x: Array, like: jax.ShapeDtypeStruct) -> Array:
            lead, shape = self._shapes(x)
            return x if x.shape != shape else _to_device(x).reshape((*lead, *like.shape))

        if not self.form.host:
            return self
        message = jax.tree.map(one, self.message, self.form.message_like)
        return Stored(message, self.lost, self.form)

    def put_away(self) -> Stored:
        """The same where it is between two steps."""

        def one(x: Array) -> Array:
            return to_host(x.reshape(self._shapes(x)[1]))

        if not self.form.host:
            return self
        return Stored(jax.tree.map(one, self.message), self.lost, self.form)

    @property
    def _of_workers(self) -> bool:
        """Whether there is an axis of workers."""
        own = jax.tree.leaves(self.message)[0].ndim - self.form.sliced
        if self.form.host and own > len(_ON_HOST):
            return own > len(_ON_HOST) + 1
        return own > jax.tree.leaves(self.form.message_like)[0].ndim

    def _shapes(self, x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axis of slices, if there is one, and the shape of an array on the host."""
        lead = x.shape[: self.form.sliced]
        return lead, (*lead, *_ON_HOST, math.prod(x.shape[len(lead) :]))

    def mixed(self, weights: np.ndarray) -> Stored:
        self = jax.vmap(Stored.fetched)(self)
        form, step = self.form, jnp.zeros((), jnp.int32)
        workers = jnp.arange(len(weights), dtype=jnp.uint32)
        decode = jax.vmap(form.decode)
        encode = jax.vmap(lambda x, worker: form.encode(x, step, worker))
        if form.sliced:
            slices_each = jax.tree.leaves(self.message)[0].shape[1]
            numbers = jnp.arange(slices_each, dtype=jnp.uint32)
            each = jax.vmap(form.encode, (0, None, None, 0))
            decode = jax.vmap(decode)
            encode = jax.vmap(lambda x, worker: each(x, step, worker, numbers))

        def mix(x: Array) -> Array:
            return einsum("mn,n...->m...", jnp.asarray(weights, x.dtype), x)

        message, more = encode(mix(decode(self.message)), workers)
        lost = jax.tree.map(lambda old, new: mix(old) + new, self.lost, more)
        return jax.vmap(Stored.put_away)(Stored(message, lost, form))

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
