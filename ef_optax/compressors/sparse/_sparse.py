"""Codecs whose messages are indices and values, and what they do with the places of a leaf."""

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
    """What is left of x when the values at these flat indices have been sent."""
    # By subtraction of the values, even where the result is known to be zero: it follows the
    # reading of x that made the message, so the compiler may write over x without a copy.
    return add_at(x, indices, -values)


def places(x: Array, indices: Array, values: Array) -> Array:
    """The mask of the flat indices."""
    del values
    return jnp.zeros(x.size, bool).at[indices].set(True, mode="drop").reshape(x.shape)


def _zero(indices: Array) -> Array:
    """A zero that the compiler does not know: the highest bit of an index, or of the first beyond.

    Zeros that it knows are one buffer for all leaves of a size, held and copied for each of them.
    """
    if indices.size == 0 or indices.dtype.itemsize != 4:
        return jnp.zeros((), jnp.uint32)
    return jax.lax.bitcast_convert_type(indices[0], jnp.uint32) >> jnp.uint32(31)


def by_size(xs: Sequence[Array]) -> list[list[int]]:
    """The numbers of the leaves of each size, in the order in which the sizes first occur.

    >>> by_size([jnp.zeros((2, 3)), jnp.zeros(4), jnp.zeros(6)])
    [[0, 2], [1]]
    """
    groups: dict[int, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault(x.size, []).append(i)
    return list(groups.values())


class SparseCodec(Codec):
    """A codec whose messages are (indices, values): decoding and averaging by scatter.

    Subclasses give ``parts(message, like) -> (indices, values)`` for one message, and ``count``.
    A message is a dictionary with one entry ``"values"`` and others that say where they belong.
    Where all workers draw the same positions (``shared_positions``) only the values travel.
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
          rows: the numbers 0, 1, ... as data: a row that is taken at such a place is taken by one
            program, whichever it is.

        Returns:
          For each size of a leaf, in the order of :func:`by_size`, the messages of its leaves, as
          :meth:`encode` would make them, stacked.
        """
        raise NotImplementedError(f"{type(self).__name__} names families but does not encode them")

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """One scatter-add of all n k pairs: no dense vector for each worker."""
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
        n = values.shape[0]
        values = values.astype(like.dtype)
        if weights is not None:
            values = values * weights[:, None].astype(values.dtype)
        return indices, values / jnp.asarray(n if total is None else total, values.dtype)

    def residual(self, x: Array, message: Message) -> Array:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return subtract_at(x, *self.parts(message, like))

    def support(self, x: Array, message: Message) -> Array:
        return places(x, *self.parts(message, jax.ShapeDtypeStruct(x.shape, x.dtype)))

    def averaged(self, x: Array, message: Message, state: Any) -> Protocol:
        """One mean of the values, where all workers have chosen the same places."""
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
    """A sparse codec whose places one worker can choose for all the others.

    What it sends of a leaf depends on the values at those places alone.
    """

    def taken(self, x: Array, indices: Array) -> Array:
        """What is sent of x at these flat indices; the values as they are unless overridden."""
        return x.reshape(-1)[indices]

    def places(self, message: Message) -> Message:
        """The message without its values."""
        return {name: part for name, part in message.items() if name != "values"}

    def follow(self, x: Array, places: Message) -> Message:
        """The message of x at the :meth:`places` of another worker's message."""
        indices, _ = self.parts({**places, "values": None}, like_of(x))
        return {**places, "values": self.taken(x, indices)}


class IndexedCodec(SparseCodec):
    """A sparse codec that sends its indices packed, each as narrow as the leaf allows."""

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
