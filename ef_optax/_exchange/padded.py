"""Messages of leaves that end within a block, cut out of the message of one vector.

Zeros between the leaves make each of them begin with a block. A codec that ignores them encodes

    | values of leaf 1 | zeros | values of leaf 2 | zeros | ...

and each field of the message has an entry for each block, or a code of equal width for each value.
So the message of a leaf alone is the beginning of its part, and what is sent is exactly these: the
whole words of codes, then the last bits of each leaf joined bit by bit. All leaves are cut out by
one gather a field, and put in their places by another one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._bits.fields import Field, Packed
from ef_optax._bits.packing import WORD_BITS
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.offsets import begins


def padded_to(sizes: Sequence[int], row: int) -> tuple[int, ...]:
    """The sizes rounded up to multiples of ``row``.

    >>> padded_to((5, 128, 300), 128)
    (128, 128, 384)
    """
    return tuple(math.ceil(size / row) * row for size in sizes)


class Cutting(Protocol):
    """What is sent of the message of leaves with zeros between them."""

    def cut(self, message: Message) -> Any:
        """What is sent of the vector's message."""
        ...

    def whole(self, sent: Any) -> Message:
        """The vector's message, with zeros where nothing was sent."""
        ...


@dataclasses.dataclass(frozen=True)
class Cut(Cutting):
    """Where the messages of leaves are in that of their vector.

    Attributes:
      codec: which encodes the vector.
      dtype: of the leaves.
      sizes: their numbers of values.
      row: to whose multiples they are padded; a multiple of the codec's block and of 32.
    """

    codec: Codec
    dtype: Any
    sizes: tuple[int, ...]
    row: int

    def cut(self, message: Message) -> list[Any]:
        found = jax.tree.leaves(message, is_leaf=_is_packed)
        return [place.cut(field) for place, field in zip(self._places, found, strict=True)]

    def whole(self, sent: list[Any]) -> Message:
        found = [place.whole(field) for place, field in zip(self._places, sent, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self._probes[0], is_leaf=_is_packed), found)

    @functools.cached_property
    def _places(self) -> list[Codes | _Entries]:
        probes = (jax.tree.leaves(probe, is_leaf=_is_packed) for probe in self._probes)
        return [self._place(*fields) for fields in zip(*probes, strict=True)]

    @functools.cached_property
    def _probes(self) -> list[Message]:
        """Messages of one block, of a block and a value, and of two blocks, without arrays."""

        def encode(x: Array) -> Message:
            own = Workers(1, jnp.int32(0), jnp.int32(0), np.uint32(0))
            return self.codec.encode(x, self.codec.step_key(own))

        sizes = (self._block, self._block + 1, 2 * self._block)
        likes = [jax.ShapeDtypeStruct((size,), self.dtype) for size in sizes]
        return [jax.eval_shape(encode, like) for like in likes]

    def _place(self, one: Field, more: Field, two: Field) -> Codes | _Entries:
        """Where the leaves are in a field that looks like these in the three probes."""
        block, packed = self._block, _is_packed(one)
        padded = padded_to(self.sizes, self.row)
        starts, total = begins(padded), sum(padded)
        each, with_one, twice = map(_amount, (one, more, two))
        if twice == 2 * each and each % block == 0 and with_one == each + each // block:
            width = each // block  # for each value
            if packed:
                return Codes(width, self.sizes, tuple(starts), total)
            return _Entries.of(starts, self.sizes, total, width)
        if twice == with_one == 2 * each and not packed:
            blocks = [math.ceil(size / block) for size in self.sizes]
            return _Entries.of([at // block for at in starts], blocks, total // block, each)
        raise TypeError(
            f"{self.codec.name} declares ignores_zeros, but a field of its message has neither an "
            "entry for each block nor codes of equal width for each value; do not declare it."
        )

    @property
    def _block(self) -> int:
        block = self.codec.separable_into
        assert block is not None
        return block


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Entries of an array that belong to leaves."""

    taken: np.ndarray
    total: int

    @classmethod
    def of(cls, starts: Sequence[int], counts: Sequence[int], total: int, each: int) -> _Entries:
        return cls(_stretches([each * a for a in starts], [each * n for n in counts]), each * total)

    def cut(self, field: Array) -> Array:
        return field[self.taken]

    def whole(self, field: Array) -> Array:
        source = np.full(self.total, len(self.taken), np.int32)
        source[self.taken] = np.arange(len(self.taken))
        return jnp.append(field, jnp.zeros((1,), field.dtype))[source]


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of equal width, of which each leaf has whole words and perhaps some last bits.

    Attributes:
      width: bits of a code.
      sizes: the codes of each leaf.
      starts: where they begin, in whole words.
      length: the codes with those of the zeros.
    """

    width: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    length: int

    @functools.cached_property
    def _words(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Positions of the whole words, those of the words with last bits, and how many bits."""
        begin = [at * self.width // WORD_BITS for at in self.starts]
        full, rest = zip(*(divmod(n * self.width, WORD_BITS) for n in self.sizes), strict=True)
        last = [a + n for a, n, bits in zip(begin, full, rest, strict=True) if bits]
        return _stretches(begin, full), np.asarray(last, np.int32), [bits for bits in rest if bits]

    def cut(self, field: Packed) -> dict[str, Field]:
        full, last, widths = self._words
        return {"full": field.words[full], "rest": fields.pack_rests(field.words[last], widths)}

    def whole(self, field: dict[str, Any]) -> Packed:
        full, last, widths = self._words
        bits = self.length * self.width
        source = np.full(bits // WORD_BITS, len(full) + len(last), np.int32)
        source[full] = np.arange(len(full))
        source[last] = len(full) + np.arange(len(last))
        rests = fields.unpack_rests(field["rest"], widths)
        zero = jnp.zeros((1,), jnp.uint32)
        return Packed(jnp.concatenate([field["full"], rests, zero])[source], bits)


def _stretches(starts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The numbers from each start on, as many as it counts.

    >>> _stretches([0, 10], [2, 3]).tolist()
    [0, 1, 10, 11, 12]
    """
    ranges = (range(start, start + n) for start, n in zip(starts, counts, strict=True))
    return np.fromiter(itertools.chain(*ranges), np.int32)


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _amount(field: Field) -> int:
    return field.bits if isinstance(field, Packed) else math.prod(field.shape)
