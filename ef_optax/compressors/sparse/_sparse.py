"""Codecs whose messages are indices and values, and how these are applied to a leaf."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean, Message
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, bits_for, like_of, size_of
from ef_optax._select.flat_view import add_at


def scatter(values: Array, indices: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The array of ``like`` that has ``values`` at the flat ``indices`` and zeros elsewhere."""
    zero = _zero(indices) if size_of(like.shape) < 1 << 31 else jnp.zeros((), jnp.uint32)
    nothing = jnp.broadcast_to(zero.astype(like.dtype), like.shape)
    return add_at(nothing, indices, values)


def subtract_at(x: Array, indices: Array, values: Array) -> Array:
    """What is left of x after the values at these flat indices are sent."""
    # The values are subtracted even if the result must be zero: the subtraction depends on the
    # read of x that made the message, so the compiler can overwrite x without a copy.
    return add_at(x, indices, -values)


def mask_at(x: Array, indices: Array, values: Array) -> Array:
    """A mask like x that is true at the flat indices."""
    del values
    return jnp.zeros(x.size, bool).at[indices].set(True, mode="drop").reshape(x.shape)


def _zero(indices: Array) -> Array:
    """A zero whose value the compiler does not know: the highest bit of an index.

    Known zeros would be one buffer for all leaves of a size, which is kept, and copied for each.
    """
    if indices.size == 0 or indices.dtype.itemsize != 4:
        return jnp.zeros((), jnp.uint32)
    return jax.lax.bitcast_convert_type(indices[0], jnp.uint32) >> jnp.uint32(31)


def by_size(xs: Sequence[Array]) -> list[list[int]]:
    """The positions in the list of the leaves of each size; sizes in order of first occurrence.

    >>> by_size([jnp.zeros((2, 3)), jnp.zeros(4), jnp.zeros(6)])
    [[0, 2], [1]]
    """
    groups: dict[int, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault(x.size, []).append(i)
    return list(groups.values())


def shares_of_mean(
    values: Array, dtype: Any, weights: Array | None, total: Array | int | None
) -> Array:
    """The values of n workers, of shape (n, k), as parts of the mean over workers."""
    values = values.astype(dtype)
    if weights is not None:
        values = values * weights[:, None].astype(values.dtype)
    return values / jnp.asarray(values.shape[0] if total is None else total, dtype)


class SparseCodec(Codec):
    """A codec whose messages are (indices, values), decoded and averaged by scattering.

    Subclasses define ``parts(message, like) -> (indices, values)`` for one message, and ``count``.
    A message is a dictionary with an entry ``"values"``, and others that determine their positions.
    If all workers draw the same positions (``shared_positions``), only the values travel.
    """

    @property
    def shared_positions(self) -> bool:
        """Whether all workers draw the same positions."""
        return False

    @abc.abstractmethod
    def count(self, size: int) -> int:
        """Number of values that the message of a leaf of ``size`` carries."""

    @abc.abstractmethod
    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        """The flat indices and the values that one message carries."""

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        indices, values = self.parts(message, like)
        return scatter(values, indices, like)

    def encode_each(self, xs: Sequence[Array], rows: Sequence[Array | int]) -> list[Message]:
        """The messages of several leaves of one family, for :meth:`joint`.

        Args:
          xs: the leaves.
          rows: the row numbers 0, 1, ... as data, so that one program can read any row.

        Returns:
          For each size, in the order of :func:`by_size`, the stacked messages of its leaves, as
          :meth:`encode` would make them.
        """
        raise NotImplementedError(f"{type(self).__name__} names families but does not encode them")

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """One scatter-add of all n k pairs, without a dense vector per worker."""
        indices, values = self.contributions(messages, like, weights, total)
        return scatter(values.reshape(-1), indices.reshape(-1), like)

    def contributions(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> tuple[Array, Array]:
        """What the workers add to the mean: indices and values, each of shape (n, k)."""
        indices, values = jax.vmap(lambda m: self.parts(m, like))(messages)
        return indices, shares_of_mean(values, like.dtype, weights, total)

    def residual(self, x: Array, message: Message) -> Array:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return subtract_at(x, *self.parts(message, like))

    def support(self, x: Array, message: Message) -> Array:
        return mask_at(x, *self.parts(message, jax.ShapeDtypeStruct(x.shape, x.dtype)))

    def averaged(self, x: Array, message: Message, state: Any) -> Protocol:
        """The protocol if all workers have the same positions: one mean of the values."""
        like = like_of(x)
        mean = yield Mean(message["values"])
        return Outcome(
            aggregate=self.decode({**message, "values": mean}, like),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )


class Followable(SparseCodec):
    """A sparse codec whose positions one worker can choose for all others.

    The values that it sends depend only on the values of the leaf at these positions.
    """

    def taken(self, x: Array, indices: Array) -> Array:
        """What is sent of x at these flat indices: its values, unless overridden."""
        return x.reshape(-1)[indices]

    def positions(self, message: Message) -> Message:
        """The message without its values."""
        return {name: part for name, part in message.items() if name != "values"}

    def follow(self, x: Array, positions: Message) -> Message:
        """The message of x at the :meth:`positions` of another worker's message."""
        indices, _ = self.parts({**positions, "values": None}, like_of(x))
        return {**positions, "values": self.taken(x, indices)}


class IndexedCodec(SparseCodec):
    """A sparse codec that sends its indices packed, each in as few bits as the leaf allows."""

    def message(self, values: Array, indices: Array, size: int) -> Message:
        """The message of these values at these indices of a leaf of ``size``."""
        return {"indices": fields.pack(indices, bits_for(size)), "values": values}

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        indices = fields.unpack(message["indices"], bits_for(size), self.count(size))
        return indices, message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        return self.count(size) * (bits_of(dtype) + bits_for(size))
