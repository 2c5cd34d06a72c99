"""Reductions over the blocks of a leaf, in one pass over it, without a copy and on all cores.

On a CPU the obvious code copies the leaf: XLA gives a single sum to a library, for which it writes
the operand out first, and turns a maximum over a whole leaf into a tree of windows, with the same
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Values are reduced in columns of at most _DEPTH values, with at least _COLUMNS columns side by
# side. On a CPU these fill vector registers, and nothing is summed across a register.
_DEPTH, _COLUMNS = 16, 8


# The values of columns of the greatest depth, with twice the least number of columns.
_RUN = 256


# Up to this many values one reduction is fast enough, and it compiles to one kernel.
_SMALL = 4096


Combine = Callable[[jax.Array, jax.Array], jax.Array]  # lax.add, lax.max or lax.min


def by_block(
    operands: tuple[jax.Array, ...], length: int, combine: tuple[Combine, ...]
) -> tuple[jax.Array, ...]:
    """Reduces the blocks of a leaf in columns of a few values, then the results in the same way.

    Args:
      operands: arrays of one shape (d,); they are read once.
      length: length of a block; the last one may be shorter.
      combine: how each operand is reduced.

    Returns:
      The results of each operand, (blocks,).

    >>> [x.tolist() for x in by_block((jnp.arange(5), jnp.arange(5)), 2, (lax.add, lax.max))]
    [[1, 5, 4], [1, 3, 4]]
    """
    size = operands[0].size
    if size == 0:
        return operands

    def parts(at: int, before: int, after: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The results before index ``at`` and from there on, in blocks of the given lengths."""
        left = by_block(tuple(x[:at] for x in operands), before, combine)
        right = by_block(tuple(x[at:] for x in operands), after, combine)
        return zip(left, right, strict=True)

    whole, runs = size // length * length, size // _RUN * _RUN
    if whole < size:
        return tuple(jnp.concatenate(pair) for pair in parts(whole, length, size - whole))
    if size <= _SMALL:
        return _reduced([x.reshape(-1, length) for x in operands], combine)
    if size == length and 0 < runs < size:
        pairs = parts(runs, runs, size - runs)
        return tuple(f(*pair) for f, pair in zip(combine, pairs, strict=True))
    run = math.gcd(length, _RUN)
    if run < 2 * _COLUMNS or length <= 4 * _COLUMNS:
        return _reduced([x.reshape(-1, length) for x in operands], combine)
    depth = min(_DEPTH, run // _COLUMNS)
    columns = _columns([x.reshape(-1, depth, run // depth) for x in operands], combine)
    return by_block(tuple(x.reshape(-1) for x in columns), length // depth, combine)


def _reduced(operands: Sequence[jax.Array], combine: tuple[Combine, ...]) -> tuple[jax.Array, ...]:
    """Reduces axis 1 of several arrays in one pass over what they are computed from."""

    def each(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(f(a, b) for f, a, b in zip(combine, left, right, strict=True))

    start = tuple(_neutral(f, x.dtype) for f, x in zip(combine, operands, strict=True))
    return tuple(lax.reduce(tuple(operands), start, each, (1,)))


def _columns(operands: Sequence[jax.Array], combine: tuple[Combine, ...]) -> tuple[jax.Array, ...]:
    """Like :func:`_reduced` for (runs, depth, columns), in the pass that computes the operands.

    On a CPU XLA gives a single reduction to a library, for which it writes the operand out first;
    it does not do so for two reductions of the halves. The barrier keeps reductions of reductions
    apart, because merged ones would run on one core.
    """
    if len(operands) == 1:
        half = operands[0].shape[1] // 2
        halves = _reduced([operands[0][:, :half], operands[0][:, half:]], combine * 2)
        results = (combine[0](*halves),)
    else:
        results = _reduced(operands, combine)
    return lax.optimization_barrier(results)


def _neutral(combine: Combine, dtype: Any) -> np.ndarray:
    if combine is lax.add:
        return np.zeros((), dtype)
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else None
    if info is not None:
        return np.asarray(info.min if combine is lax.max else info.max, dtype)
    return np.asarray(-np.inf if combine is lax.max else np.inf, dtype)


UNROLL_LIMIT = 16
"""Up to this many workers ``decode_mean`` is an unrolled sum; beyond, a loop compiles faster."""
