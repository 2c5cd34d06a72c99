"""Sizes under entropy codes, counted exactly as in the papers; nothing is encoded here.

A message of this library has a fixed number of bits, because shapes are fixed when a program is
compiled. Where a paper counts the bits of an entropy code, which depend on the data, these
functions give that number, the *information*, for the codes of a message. They run on the host with
NumPy and cannot be traced.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ef_optax._numeric import check


def _floor_log2(values: np.ndarray) -> np.ndarray:
    """floor(log2 v) of positive integers, exactly."""
    return np.asarray([int(v).bit_length() - 1 for v in values.reshape(-1)], np.int64)


def _positive(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer) or (array < 1).any():
        raise ValueError(f"{name}: values must be integers of at least 1; add 1 to code zeros.")
    return array


def elias_gamma_bits(values: Any) -> int:
    """Bits of positive integers in Elias' gamma code: 2 floor(log2 v) + 1 each.

    Args:
      values: integers >= 1, any shape.

    Returns:
      The number of bits.

    Raises:
      ValueError: if a value is not a positive integer.

    Example:
      >>> import ef_optax as ef
      >>> [ef.measure.elias_gamma_bits([v]) for v in (1, 2, 4, 17)]
      [1, 3, 5, 9]

    References:
      Elias, Universal codeword sets and representations of the integers, 1975.
    """
    return int(np.sum(2 * _floor_log2(_positive(values, "elias_gamma_bits")) + 1))


def elias_delta_bits(values: Any) -> int:
    """Bits of positive integers in Elias' delta code: the length in gamma code, then the rest.

    With N = floor(log2 v): N + 2 floor(log2(N + 1)) + 1 each.

    Args:
      values: integers >= 1, any shape.

    Returns:
      The number of bits.

    Raises:
      ValueError: if a value is not a positive integer.

    Example:
      >>> import ef_optax as ef
      >>> [ef.measure.elias_delta_bits([v]) for v in (1, 2, 4, 17)]
      [1, 4, 5, 9]

    References:
      Elias, Universal codeword sets and representations of the integers, 1975.
    """
    length = _floor_log2(_positive(values, "elias_delta_bits"))
    return int(np.sum(length + 2 * _floor_log2(length + 1) + 1))


def sparse_elias_bits(codes: Any) -> int:
    """Bits of signed level numbers as QSGD sends them: gaps, signs and levels of the non-zeros.

    Each code that is not 0 costs its distance to the one before (to -1 for the first) in delta
    code, one bit of sign, and its level in delta code.

    Args:
      codes: integers, any shape, read in order.

    Returns:
      The number of bits, without the norm (32 more).

    Example:
      >>> import ef_optax as ef
      >>> ef.measure.sparse_elias_bits([0, -1, 0, 0, 3])  # gaps 2 and 3, levels 1 and 3
      15

    References:
      Alistarh et al., QSGD, 2017, appendix A.2; with the delta code as in BytePS.
    """
    flat = np.asarray(codes).reshape(-1)
    positions = np.flatnonzero(flat)
    if not positions.size:
        return 0
    gaps = np.diff(positions, prepend=-1)
    return elias_delta_bits(gaps) + positions.size + elias_delta_bits(np.abs(flat[positions]))


def arithmetic_bits(values: Any) -> float:
    """Bits of a vector under arithmetic coding with its own histogram.

    ``d H + m log2((d + m) e/m) + 66``, for d values of empirical entropy H, the histogram of their
    m different values, two float32 end points and 2 more bits.

    Args:
      values: numbers, any shape.

    Returns:
      The number of bits (a bound on the expected length, not an integer).

    Example:
      >>> import ef_optax as ef
      >>> round(ef.measure.arithmetic_bits([1.0, 2.0, 3.0, 4.0, 5.0]), 4)
      89.8231

    References:
      Suresh, Yu, Kumar, McMahan, Distributed mean estimation, 2017, Theorem 4.
    """
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        return 66.0
    _, counts = np.unique(flat, return_counts=True)
    share, distinct = counts / flat.size, counts.size
    entropy = float(-np.sum(share * np.log2(share)))
    histogram = distinct * math.log2((flat.size + distinct) * math.e / distinct)
    return flat.size * entropy + histogram + 66


def run_length_bits(mask: Any, width: int) -> int:
    """Bits of a mask's positions as lengths of runs of zeros, in counters of ``width`` bits.

    A counter before each position, and one at the end, holds the number of zeros since the last
    position. A counter that is full, at 2^width - 1, is followed by another.

    Args:
      mask: booleans, any shape, read in order.
      width: bits of a counter, at least 1.

    Returns:
      The number of bits, without the values at the positions.

    Raises:
      ValueError: for a bad ``width``.

    Example:
      >>> import ef_optax as ef
      >>> ef.measure.run_length_bits([0, 0, 1, 1, 0, 0, 0, 0], width=2)  # 2 | 0 | 3 1
      8

    References:
      Golomb, Run-length encodings, 1966 (with counters of fixed width).
    """
    check.count("run_length_bits", "width", width)
    flat = np.asarray(mask).reshape(-1) != 0
    ends = np.append(np.flatnonzero(flat), flat.size)
    runs = np.diff(ends, prepend=-1) - 1
    return int(np.sum(runs // (2**width - 1) + 1)) * width


def zero_run_bits(values: Any) -> int:
    """Bits of 3LC's last stage: bytes of five ternary values, in which runs of zeros are shortened.

    Five values of {-1, 0, 1} make a byte 0..242 (the last five are padded with zeros). A run of 2
    to 14 bytes 121, which stand for five zeros each, becomes one byte 243..255; longer runs take
    several.

    Args:
      values: integers in {-1, 0, 1}, any shape, read in order.

    Returns:
      The number of bits, without the scale (32 more).

    Raises:
      ValueError: for other values.

    Example:
      >>> import ef_optax as ef, numpy as np
      >>> ef.measure.zero_run_bits(np.zeros(75, int)), ef.measure.zero_run_bits([1] + [0] * 9)
      (16, 16)

    References:
      Lim, Andersen, Kaminsky, 3LC, 2019, section 3.3.
    """
    flat = np.asarray(values).reshape(-1)
    if not np.isin(flat, (-1, 0, 1)).all():
        raise ValueError("zero_run_bits: values must be -1, 0 or 1.")
    groups = np.pad(flat, (0, -flat.size % 5)).reshape(-1, 5)
    silent = (groups == 0).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(int)))
    runs = edges[1::2] - edges[::2]
    return 8 * int(np.sum(~silent) + np.sum(-(-runs // 14)))
