"""Bit fields in 32-bit words: how a message becomes exactly as long as its information.

Fields of ``bits`` bits follow each other in little-endian bit order: field ``i`` takes the bits
``i * bits ... (i + 1) * bits - 1`` of the stream, and bit ``b`` of the stream is bit ``b % 32`` of
word ``b // 32``. Only the last word is padded, with zeros.

Every function is a fixed pattern of shifts and ors at static or computed positions, without a loop,
a carry or a scatter. So it works in the same way under `jit`, `vmap` and inside `shard_map`, and
compiles to few kernels.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BITS = 32

# Vectors of at most this many codes are padded and packed at once, which compiles to fewer kernels.
_SMALL = 1 << 16
# If a group has at most this many words, each has its own pattern of shifts, which is fastest. With
# more words each pattern would be a separate kernel.
_FEW_WORDS = 5


def packed_words(count: int, bits: int) -> int:
    """Number of words that ``count`` fields take, ``ceil(count * bits / 32)``.

    Args:
      count: number of fields.
      bits: width of one field, 0 to 32.

    Example:
      >>> packed_words(33, 1), packed_words(7, 12), packed_words(0, 8), packed_words(9, 0)
      (2, 3, 0, 0)
    """
    return -(-count * bits // WORD_BITS)


@functools.partial(jax.jit, static_argnames="bits")
def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes of ``bits`` bits into words.

    Args:
      codes: shape (count,), any integer dtype, every value in ``0 ... 2**bits - 1`` (not checked).
      bits: static width of a field, 0 to 32. A field of zero bits (the index into a single value)
        packs to no words at all.

    Returns:
      uint32 of shape ``(packed_words(count, bits),)``.

    Raises:
      ValueError: if ``bits`` is not in 0 ... 32 or ``codes`` is not one-dimensional.

    Example:
      >>> words = pack(jnp.array([1, 2, 3, 4], jnp.uint32), 12)
      >>> [hex(word) for word in words.tolist()]
      ['0x3002001', '0x40']
    """
    _check_bits(bits)
    if codes.ndim != 1:
        raise ValueError(
            f"pack: codes of shape {codes.shape} must be one-dimensional; flatten them first."
        )
    count = codes.size
    if count == 0 or bits == 0:
        return jnp.zeros((0,), jnp.uint32)
    codes = codes.astype(jnp.uint32)
    (fields, words), together = _group(bits), _together(bits)
    multiple = fields if words <= _FEW_WORDS else together
    if count % multiple and count > _SMALL:
        # The full groups are packed without a copy. Only the incomplete end is padded, so that no
        # pass over the data is spent on padding.
        full = count - count % fields
        return jnp.concatenate([pack(codes[:full], bits), pack(codes[full:], bits)])
    codes = lax.pad(codes, np.uint32(0), ((0, -count % multiple, 0),))
    if together > 1:
        codes = _joined(codes.reshape(-1, together), bits)
    if words > 1:
        in_words = _pack_columns if words <= _FEW_WORDS else _pack_gathered
        codes = in_words(codes, bits * together)
    return codes[: packed_words(count, bits)]


@functools.partial(jax.jit, static_argnames=("bits", "count"))
def unpack(words: jax.Array, bits: int, count: int) -> jax.Array:
    """Reads ``count`` codes of ``bits`` bits back, the inverse of `pack`.

    Args:
      words: uint32 of shape ``(packed_words(count, bits),)``.
      bits: static width of a field, 0 to 32.
      count: static number of fields.

    Returns:
      uint32 of shape (count,).

    Raises:
      ValueError: if ``bits`` is not in 0 ... 32 or the number of words is not the one that
        ``count`` fields take.

    Example:
      >>> unpack(pack(jnp.array([5, 0, 7], jnp.uint32), 3), 3, 3).tolist()
      [5, 0, 7]
    """
    _check_bits(bits)
    if words.shape != (packed_words(count, bits),):
        raise ValueError(
            f"unpack: the field has words of shape {words.shape}, but {count} codes of {bits} bits "
            f"take {packed_words(count, bits)} words; pass the width and count that were packed."
        )
    if count == 0 or bits == 0:
        return jnp.zeros((count,), jnp.uint32)
    together = _together(bits)
    if together == 1:
        return _unpack_gathered(words, bits, count)
    joined = words
    if WORD_BITS % bits:
        joined = _unpack_gathered(words, bits * together, -(-count // together))
        # Without the barrier the compiler reads the words again for each code.
        joined = lax.optimization_barrier(joined)
    shifts = np.arange(together, dtype=np.uint32) * np.uint32(bits)
    codes = (joined[:, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(-1)[:count]


def pack_signs(x: jax.Array) -> jax.Array:
    """Packs the signs of a vector, one bit each: 1 if ``x >= 0``.

    Both zeros count as plus; a NaN counts as minus.

    Args:
      x: floating array of shape (count,).

    Returns:
      uint32 of shape ``(packed_words(count, 1),)``.

    Example:
      >>> pack_signs(jnp.array([1.0, -2.0, 0.0, -0.0])).tolist()
      [13]
    """
    return pack((x >= 0).astype(jnp.uint32), 1)


def pack_signs_and_norm(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Packs the signs and sums the magnitudes in one pass over the vector.

    Args:
      x: floating array of shape (count,).

    Returns:
      The words of `pack_signs`, and the 1-norm ``sum |x_i|`` as a scalar in float32, or in the
      dtype of x if that is wider.

    Example:
      >>> words, norm = pack_signs_and_norm(jnp.array([1.0, -2.0, 0.5]))
      >>> words.tolist(), norm.item()
      ([5], 3.5)
    """
    wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    if x.size == 0:
        return jnp.zeros((0,), jnp.uint32), jnp.zeros((), wide)
    full = x.size - x.size % WORD_BITS
    parts = []
    if full:
        parts.append(signs_and_norms(x[:full].reshape(-1, WORD_BITS), wide))
    if full < x.size:
        words, norms = signs_and_norms(x[full:].reshape(1, -1), wide)
        parts.append((words, norms))
    words = jnp.concatenate([words for words, _ in parts])
    return words, sum((jnp.sum(norms) for _, norms in parts), jnp.zeros((), wide))


def signs_and_norms(rows: jax.Array, wide: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """A word and a 1-norm for each row of at most 32 values, by one reduction of two operands.

    Example:
      >>> words, norms = signs_and_norms(jnp.array([[1.0, -2.0], [0.5, 0.0]]), jnp.dtype("float32"))
      >>> words.tolist(), norms.tolist()
      ([1, 3], [3.0, 0.5])
    """
    bits = (rows >= 0).astype(jnp.uint32) << np.arange(rows.shape[1], dtype=np.uint32)

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return left[0] | right[0], left[1] + right[1]

    start = (np.zeros((), np.uint32), np.zeros((), wide))
    return lax.reduce((bits, jnp.abs(rows.astype(wide))), start, add, (1,))


def unpack_signs(words: jax.Array, count: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Reads packed signs back as ``+1`` and ``-1``.

    Args:
      words: uint32 of shape ``(packed_words(count, 1),)``.
      count: static number of signs.
      dtype: floating dtype of the result.

    Returns:
      ±1 of shape (count,).

    Example:
      >>> unpack_signs(jnp.array([13], jnp.uint32), 4, jnp.float32).tolist()
      [1.0, -1.0, 1.0, 1.0]
    """
    plus = unpack(words, 1, count) != 0
    return jnp.where(plus, jnp.ones((), dtype), -jnp.ones((), dtype))


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= WORD_BITS:
        raise ValueError(f"bits must be between 0 and {WORD_BITS}, got {bits}")


def _group(bits: int) -> tuple[int, int]:
    """The shortest run of fields that ends on a word boundary: (fields, words)."""
    run = math.lcm(bits, WORD_BITS)
    return run // bits, run // WORD_BITS


def _together(bits: int) -> int:
    """How many neighbouring codes are first joined to one code that fits into a word.

    These are as many as fill a word. Narrow codes that never fill a word are joined in a power of
    two, so that everything else happens in vector registers.

    >>> [_together(bits) for bits in (1, 3, 4, 6, 12, 16, 32)]
    [32, 8, 8, 4, 1, 2, 1]
    """
    if WORD_BITS % bits == 0:
        return WORD_BITS // bits
    return 1 << (WORD_BITS // bits).bit_length() - 1 if bits < 8 else 1


def _joined(codes: jax.Array, bits: int) -> jax.Array:
    """Joins each row of codes to one code."""
    runs, together = codes.shape
    shifts = np.arange(together, dtype=np.uint32) * np.uint32(bits)
    if bits > 2:
        return lax.reduce(codes << shifts, np.uint32(0), lax.bitwise_or, (1,))
    # The codes are joined to bytes first, and by an or instead of a sum, so that the compiler keeps
    # them in vector registers. Joining 32 fields to a word at once takes six times as long.
    parts = (codes.reshape(-1, 8 // bits) << shifts[: 8 // bits]).astype(jnp.uint8)
    octets = lax.reduce(parts, np.uint8(0), lax.bitwise_or, (1,))
    return lax.bitcast_convert_type(octets.reshape(runs, 4), jnp.uint32)


def _pack_columns(codes: jax.Array, bits: int) -> jax.Array:
    """Packs full groups of codes: the first words of all groups, then the second, and so on."""
    fields, words = _group(bits)
    codes = codes.reshape(-1, fields)
    columns = []
    for word in range(words):
        start, total = word * WORD_BITS, None
        for field in range(start // bits, min(fields, -(-(start + WORD_BITS) // bits))):
            shift = field * bits - start
            column = codes[:, field]
            part = column << np.uint32(shift) if shift >= 0 else column >> np.uint32(-shift)
            total = part if total is None else total | part
        columns.append(total)
    return jnp.stack(columns, axis=1).reshape(-1)


def _pack_gathered(codes: jax.Array, bits: int) -> jax.Array:
    """Packs by gathering the codes of each word, whose positions are computed."""
    fields, words = _group(bits)
    starts = WORD_BITS * np.arange(words)
    most = np.max((starts + WORD_BITS - 1) // bits - starts // bits) + 1  # codes in one word
    word = lax.iota(jnp.uint32, packed_words(codes.size, bits))
    group, number = _divided(word, words)
    first, behind = _divided(number * WORD_BITS, bits)  # its number of bits in the word before
    first += group * fields
    last = np.uint32(codes.size - 1)
    total = codes.at[first].get(mode="promise_in_bounds") >> behind
    for later in range(1, most):
        index = first + np.uint32(later)
        code = codes.at[jnp.minimum(index, last)].get(mode="promise_in_bounds")
        shift = np.uint32(later * bits) - behind
        within = (index <= last) & (shift < WORD_BITS)
        total |= jnp.where(within, code << jnp.minimum(shift, WORD_BITS - 1), 0)
    return total


def _unpack_gathered(words: jax.Array, bits: int, count: int) -> jax.Array:
    """Reads each code from the two words that may contain it."""
    fields, group_words = _group(bits)
    group, number = _divided(lax.iota(jnp.uint32, count), fields)
    word, shift = _divided(number * bits, WORD_BITS)
    word += group * group_words
    after = jnp.minimum(word + np.uint32(1), np.uint32(words.size - 1))
    low = words.at[word].get(mode="promise_in_bounds") >> shift
    # A shift by 32 is undefined, so the part in the next word is shifted in two steps.
    high = words.at[after].get(mode="promise_in_bounds") << 1
    high = high << (np.uint32(WORD_BITS - 1) - shift)
    return (low | high) & np.uint32((1 << bits) - 1)


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """The quotient and the remainder of unsigned integers."""
    divisor = lax.full_like(x, by)
    return lax.div(x, divisor), lax.rem(x, divisor)
