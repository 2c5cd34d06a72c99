"""Fields of a message as words: their bits are contiguous, with less than one word of padding.

A message is a tree of fields. An array is a field of its own bytes. :class:`Packed` is a field of
bits, whose last word is only partly used. On the wire

    | full words of field 1 | full words of field 2 | ... | rests, bit by bit | padding |

The full words are copied without a shift. The rest of each field is less than a word; these rests
are joined bit by bit at static positions. So all fields together take ``ceil(bits / 32)`` words.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ef_optax._bits import packing
from ef_optax._bits.packing import WORD_BITS
from ef_optax._numeric import check, offsets
from ef_optax._numeric.reductions import UNROLL_LIMIT


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("bits",))
@dataclasses.dataclass(frozen=True)
class Packed:
    """A field of bits: words of which only the first ``bits`` bits are part of the message.

    Attributes:
      words: uint32 of shape (..., ceil(bits / 32)); the bits beyond ``bits`` are zero.
      bits: exact number of bits along the last axis, a Python int.
    """

    words: jax.Array
    bits: int


Field = Packed | jax.Array


# ---------------------------------------------------------------------------- codes and signs


def pack(codes: ArrayLike, width: int) -> Packed:
    """Packs codes of ``width`` bits into a field of a message, one after the other.

    Args:
      codes: shape (count,) of any integer dtype, or a list of integers; every value in
        ``0 ... 2**width - 1`` (not checked).
      width: static width of a code, 0 to 32 bits; codes of 0 bits take no words.

    Returns:
      The field, of ``count * width`` bits.

    Raises:
      TypeError: if ``codes`` are floating-point numbers.
      ValueError: if ``width`` is not in 0 ... 32 or ``codes`` is not one-dimensional.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> field = ef.extend.pack(jnp.array([1, 0, 3, 2, 1]), 2)
      >>> field.bits, field.words.tolist()
      (10, [433])
    """
    check.count("pack", "width", width, least=0, most=WORD_BITS)
    codes = jnp.asarray(codes)
    if not codes.size:  # an empty list is an array of floats
        codes = codes.astype(jnp.uint32)
    if jnp.issubdtype(codes.dtype, jnp.inexact):
        raise TypeError(
            f"pack: codes of dtype {codes.dtype} would lose their fractions; round them to "
            f"integers in 0 ... 2**{width} - 1 first."
        )
    return Packed(packing.pack(codes, width), codes.size * width)


def unpack(field: Packed, width: int, count: int) -> jax.Array:
    """Reads ``count`` codes of ``width`` bits back, the inverse of :func:`pack`.

    Args:
      field: what :func:`pack` returned, on any worker.
      width: static width of a code, 0 to 32 bits.
      count: static number of codes.

    Returns:
      uint32 of shape (count,).

    Raises:
      TypeError: if ``field`` is not what :func:`pack` returned.
      ValueError: for a bad ``width`` or ``count``, or if the field has another number of words than
        ``count`` codes take.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> ef.extend.unpack(ef.extend.pack(jnp.array([5, 0, 7]), 3), 3, 3).tolist()
      [5, 0, 7]
    """
    if not isinstance(field, Packed):
        raise TypeError(f"unpack: field={field!r} must be what ef_optax.extend.pack returned.")
    check.count("unpack", "width", width, least=0, most=WORD_BITS)
    check.count("unpack", "count", count, least=0)
    return packing.unpack(field.words, width, count)


def pack_signs(x: jax.Array) -> Packed:
    """The signs of a vector, one bit each: 1 if ``x >= 0``."""
    return Packed(packing.pack_signs(x), x.size)


def unpack_signs(field: Packed, count: int, dtype: Any) -> jax.Array:
    """Reads packed signs back as +1 and -1 of the given dtype."""
    return packing.unpack_signs(field.words, count, dtype)


def pack_rests(words: jax.Array, widths: Sequence[int]) -> Packed:
    """The lowest bits of each word, as many as its width in 1 ... 31, joined bit by bit.

    >>> field = pack_rests(jnp.array([7, 6], jnp.uint32), [2, 3])
    >>> field.bits, field.words.tolist(), unpack_rests(field, [2, 3]).tolist()
    (5, [27], [3, 6])
    """
    if not len(widths):
        return Packed(jnp.zeros((0,), jnp.uint32), 0)
    masks = (np.uint64(1) << np.asarray(widths, np.uint64)) - np.uint64(1)
    return Packed(_join(words & masks.astype(np.uint32), widths), sum(widths))


def unpack_rests(field: Packed, widths: Sequence[int]) -> jax.Array:
    """The inverse of :func:`pack_rests`."""
    return _split(field.words, widths)


# ---------------------------------------------------------------------------- a message as words


def exact_bits(message: Any) -> int:
    """The bits of all fields of a message (or of its shapes), without any padding.

    >>> exact_bits([pack(jnp.arange(3), 2), jnp.zeros(3, jnp.bfloat16)])
    54
    """
    total = 0
    for field in _fields(message):
        if isinstance(field, Packed):
            total += math.prod(field.words.shape[:-1]) * field.bits
        else:
            total += math.prod(field.shape) * jnp.dtype(field.dtype).itemsize * 8
    return total


@jax.jit
def to_words(message: Any) -> jax.Array:
    """All fields of a message in ``ceil(exact_bits / 32)`` words.

    >>> to_words([pack(jnp.arange(3), 2), pack(jnp.arange(4), 3)]).tolist()
    [107044]
    """
    parts, ends, widths = [], [], []
    for field in _fields(message):
        rows, full, rest = _layout(field)
        words, end = _cut(field, full, rest)
        if words.size:
            parts.append(words)
        if rest:
            ends.append(end)
            widths += [rest] * rows
    if ends:
        parts.append(_join(lax.concatenate(ends, 0), widths))
    if not parts:
        return jnp.zeros((0,), jnp.uint32)
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)


def from_words(words: jax.Array, like: Any, runtime: jax.Array | None = None) -> Any:
    """The inverse of :func:`to_words`, for a message whose fields look like those of ``like``.

    If ``runtime`` is given (see ``offsets.as_data``), one program reads all equal fields.
    """
    message = from_rows(words[None], like, runtime)
    return jax.tree.map(lambda x: lax.squeeze(x, [0]), message)


def from_rows(words: jax.Array, like: Any, runtime: jax.Array | None = None) -> Any:
    """The messages of several workers, one from each row; all arrays have a leading worker axis.

    >>> messages = [pack(jnp.array(codes), 3) for codes in ([1, 2], [3, 4])]
    >>> rows = jnp.stack([to_words(message) for message in messages])
    >>> from_rows(rows, messages[0]).words.tolist() == [m.words.tolist() for m in messages]
    True
    """
    leaves, treedef = jax.tree.flatten(like)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _from_rows(words, runtime, treedef, shapes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _from_rows(
    words: jax.Array,
    runtime: jax.Array | None,
    treedef: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """:func:`from_rows`, traced once for messages of the same form.

    Codes are cut out worker by worker. XLA:CPU fuses a cut with the decoding, and if several parts
    of one loop read the same cut, it calls a function for every value, which is ten times slower.
    """
    like = jax.tree.unflatten(treedef, shapes)
    fields, treedef = jax.tree.flatten(like, is_leaf=lambda x: isinstance(x, Packed))
    layouts = [_layout(field) for field in fields]
    widths = [rest for rows, _, rest in layouts if rest for _ in range(rows)]
    whole = sum(rows * full for rows, full, _ in layouts)
    ends = jax.vmap(lambda row: _split(row, widths))(words[:, whole:])
    at = offsets.starts([rows * full for rows, full, _ in layouts], layouts, runtime)
    end = offsets.starts([rows * bool(rest) for rows, _, rest in layouts], layouts, runtime)
    out = []
    by_worker = [(words[i], ends[i]) for i in range(len(words)) if len(words) <= UNROLL_LIMIT]
    for i, field in enumerate(fields):
        read = functools.partial(_read, field=field, at=at[i], end=end[i])
        if isinstance(field, Packed) and by_worker:
            each = [read(*of_worker) for of_worker in by_worker]
            out.append(jax.tree.map(lambda *of_workers: jnp.stack(of_workers), *each))
        else:
            out.append(jax.vmap(read)(words, ends))
    return jax.tree.unflatten(treedef, out)


def _read(words: jax.Array, ends: jax.Array, field: Field, at: Any, end: Any) -> Field:
    """A field like ``field`` of one message, whose words and rests begin at these positions."""
    rows, full, rest = _layout(field)
    each = full + (rest > 0 and rows == 1)
    own = offsets.piece(words, at, rows * each).reshape(rows, each)
    if rest:
        last = offsets.piece(ends, end, rows)[:, None]
        if rows == 1:  # overwriting the next word is far cheaper on a CPU than concatenating
            own = lax.dynamic_update_slice(own, last, (0, full))
        else:
            own = lax.concatenate([own, last], 1)
    return _as_field(own, field)


def _fields(message: Any) -> list[Field]:
    return jax.tree.leaves(message, is_leaf=lambda x: isinstance(x, Packed))


def _layout(field: Field) -> tuple[int, int, int]:
    """The rows of a field, the full words of a row, and the remaining bits of a row.

    An array is one row of bytes; a packed field has several rows if leaves are stacked.
    """
    if isinstance(field, Packed):
        return math.prod(field.words.shape[:-1]), *divmod(field.bits, WORD_BITS)
    return 1, *divmod(exact_bits(field), WORD_BITS)


def _cut(field: Field, full: int, rest: int) -> tuple[jax.Array, jax.Array]:
    """The full words of a field, and one word for the remaining bits of each row, if any."""
    if isinstance(field, Packed):
        rows = field.words.reshape(-1, full + bool(rest)) if full or rest else field.words
        return (rows[:, :full] if rest else rows).reshape(-1), rows[:, -1] if rest else rows
    dtype, flat = jnp.dtype(field.dtype), field.reshape(-1)
    if dtype == jnp.bool_ or dtype.itemsize not in (1, 2, 4, 8):
        raise TypeError(
            f"a message holds an array of dtype {dtype}; send whole bytes, and bits by "
            "ef_optax.extend.pack."
        )
    if dtype.itemsize >= 4:
        return lax.bitcast_convert_type(flat, jnp.uint32).reshape(-1), flat
    # The values travel as integers, so that no operation can change a NaN.
    flat = lax.bitcast_convert_type(flat, f"uint{8 * dtype.itemsize}")
    each = 4 // dtype.itemsize
    flat = jnp.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    words = lax.bitcast_convert_type(flat, jnp.uint32)
    return (words[:full], words[full:]) if rest else (words, words)


def _as_field(rows: jax.Array, like: Field) -> Field:
    if isinstance(like, Packed):
        return Packed(rows.reshape(like.words.shape), like.bits)
    flat, dtype = rows.reshape(-1), jnp.dtype(like.dtype)
    if dtype.itemsize == 8:
        flat = flat.reshape(-1, 2)
    else:
        values = lax.bitcast_convert_type(flat, f"uint{8 * dtype.itemsize}")
        flat = values.reshape(-1)[: math.prod(like.shape)]
    return lax.bitcast_convert_type(flat, dtype).reshape(like.shape)


def _bit_positions(widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """The word and the shift of each rest if their bits are contiguous, and the number of words."""
    ends = np.cumsum(np.asarray(widths, np.int64))
    starts = ends - np.asarray(widths)
    return (
        starts // WORD_BITS,
        (starts % WORD_BITS).astype(np.uint32),
        -(-int(ends[-1]) // WORD_BITS),
    )


def _join(rests: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Joins rests of the given widths bit by bit; no two share a bit."""
    if len(widths) == 1:
        return rests
    word, shift, count = _bit_positions(widths)
    joined = jnp.zeros(count, jnp.uint32).at[word].add(rests << shift)
    over = np.flatnonzero(shift + np.asarray(widths) > WORD_BITS)
    if over.size:
        high = rests[over] >> (np.uint32(WORD_BITS) - shift[over])
        joined = joined.at[word[over] + 1].add(high)
    return joined


def _split(words: jax.Array, widths: Sequence[int]) -> jax.Array:
    """The inverse of :func:`_join`."""
    if not widths:
        return words
    word, shift, count = _bit_positions(widths)
    low = words[word] >> shift
    # A shift by 32 is undefined, so the part in the next word is shifted in two steps.
    high = (words[np.minimum(word + 1, count - 1)] << 1) << (np.uint32(WORD_BITS - 1) - shift)
    mask = ((np.uint64(1) << np.asarray(widths, np.uint64)) - np.uint64(1)).astype(np.uint32)
    return (low | high) & mask
