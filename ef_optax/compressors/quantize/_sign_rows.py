"""Signs and mean magnitudes of small leaves of different shapes, which are the rows of one array.

A row is a flattened leaf and then zeros. The leaves of a family are rounded up to the same power of
two, so that no row has more zeros than values. One program encodes and one decodes all rows; what
is sent of each leaf is the same as without its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import packing
from ef_optax._bits.fields import Packed
from ef_optax._bits.packing import WORD_BITS
from ef_optax._core.codec import Codec
from ef_optax._core.joinable import JointCodec
from ef_optax._core.outcome import Protocol
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._exchange.joined import together
from ef_optax._exchange.padded import Codes
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape


@dataclasses.dataclass(frozen=True)
class SignRows(JointCodec):
    """``inner``, which is ``scaled_sign``, on each of a list of small leaves."""

    def protocol(self, x: list[Array], state: Any, workers: Workers) -> Protocol:
        rows = _Rows(tuple(leaf.size for leaf in x))
        padded = [rows.length] * len(x)
        return (yield from together(rows, x, state, workers, padded, _Cut(rows)))


@dataclasses.dataclass(frozen=True)
class _Rows(Codec):
    """Every row of a vector times the mean magnitude of its leaf's values.

    Attributes:
      sizes: the values of each row that are no padding.
    """

    sizes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Of a row: whole words of signs."""
        return math.ceil(max(self.sizes) / WORD_BITS) * WORD_BITS

    @property
    def traits(self) -> Traits:
        return Traits()

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        rows = x.reshape(-1, self.length)
        words, norms = jax.vmap(packing.pack_signs_and_norm)(rows)
        scales = norms / np.maximum(1, self.sizes).astype(norms.dtype)
        return {"signs": Packed(words.reshape(-1), x.size), "scale": scales}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        signs = packing.unpack_signs(message["signs"].words, like.shape[0], like.dtype)
        scale = message["scale"].astype(like.dtype)[:, None]
        return (signs.reshape(-1, self.length) * scale).reshape(-1)

    def residual(self, x: Array, message: Message) -> Array:
        rows, scale = x.reshape(-1, self.length), message["scale"].astype(x.dtype)[:, None]
        return (rows - jnp.where(rows >= 0, scale, -scale)).reshape(-1)

    def finite(self, x: Array, message: Message) -> Array:
        del x
        return jnp.all(jnp.isfinite(message["scale"]))

    def bits(self, shape: Shape, dtype: Any = None) -> int:
        raise AssertionError("rows are never asked for bits; their leaves' codec is")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The signs of the leaves without those of the zeros."""

    rows: _Rows

    def cut(self, message: Message) -> Message:
        return {**message, "signs": self._codes.cut(message["signs"])}

    def whole(self, sent: Message) -> Message:
        return {**sent, "signs": self._codes.whole(sent["signs"])}

    @functools.cached_property
    def _codes(self) -> Codes:
        sizes, length = self.rows.sizes, self.rows.length
        starts = tuple(i * length for i in range(len(sizes)))
        return Codes(1, sizes, starts, length * len(sizes))
