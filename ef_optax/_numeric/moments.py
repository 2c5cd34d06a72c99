"""Sums over what goes into a compressor and what comes out, in one pass over each leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.norms import leaf_sums

_SMALL = 1 << 16
"""Leaves of up to this many elements are stacked with others of their size, which compiles faster;
stacking larger ones would cost more than it saves."""

MOMENTS = (
    "input",  # the sum of squares of the input p
    "input_magnitudes",  # the sum of |p|
    "message",  # the sum of squares of what was sent, c
    "product",  # the inner product of p and c
    "error",  # the sum of squares of p - c
    "message_nonzeros",  # how many entries of c are not zero
    "error_zeros",  # how many entries of p - c are exactly zero
)
"""The sums that :func:`moments` gives, in its order."""


def moments(inputs: Sequence[Array], sent: Sequence[Array], errors: Sequence[Array]) -> Array:
    """The sums ``MOMENTS`` of every leaf, each on a single device.

    Args:
      inputs: p, any shapes, float32 or float64.
      sent: c, of the same shapes.
      errors: p - c.

    Returns:
      Shape (leaves, len(MOMENTS)), float32.

    >>> p, c = jnp.array([3.0, -1.0, 0.0]), jnp.array([3.0, 0.0, 0.0])
    >>> moments([p], [c], [p - c]).tolist()
    [[10.0, 4.0, 9.0, 9.0, 1.0, 1.0, 2.0]]
    """
    return _by_size(_moments, inputs, sent, errors, columns=len(MOMENTS))


def squared_norms(leaves: Sequence[Array], *, local: bool = True) -> Array:
    """The sums of squares, (leaves,) float32.

    Args:
      leaves: any shapes, floating.
      local: whether each of them lies on a single device, so that it may be flattened and stacked.

    >>> squared_norms([jnp.array([3.0, 4.0]), jnp.zeros((2, 0))]).tolist()
    [25.0, 0.0]
    """
    if local:
        return _by_size(_squared_norm, leaves, columns=1)[:, 0]
    return jnp.stack([squared_norm(x) for x in leaves]) if leaves else jnp.zeros(0, jnp.float32)


def squared_norm(x: Array) -> Array:
    """The sum of squares as a float32 scalar, for leaves that may be split over devices."""
    wide = lax.convert_element_type(x, wide_dtype(x.dtype))
    total = lax.reduce(lax.mul(wide, wide), np.zeros((), wide.dtype), lax.add, tuple(range(x.ndim)))
    return total.astype(jnp.float32)


def _by_size(sums: Callable[..., Array], *operands: Sequence[Array], columns: int) -> Array:
    """``sums`` of every leaf as a row; small leaves of one size are stacked."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, xs in enumerate(zip(*operands, strict=True)):
        size = xs[0].size
        if size:
            groups.setdefault((xs[0].dtype, size, i if size > _SMALL else None), []).append(i)
    parts, order = [jnp.zeros((1, columns), jnp.float32)], [0] * len(operands[0])
    rows = 1  # the first one is that of the leaves without entries
    for members in groups.values():
        stacks = [jnp.stack([xs[i].reshape(-1) for i in members]) for xs in operands]
        parts.append(_of_stack(sums, *stacks))
        for i in members:
            order[i], rows = rows, rows + 1
    return jnp.concatenate(parts)[np.asarray(order, np.int32)]


@jax.jit(static_argnums=0)
def _of_stack(sums: Callable[..., Array], *stacks: Array) -> Array:
    """The sums of several leaves of one size, which are the rows of the arguments."""
    if stacks[0].shape[0] == 1:
        return sums(*(x[0] for x in stacks))[None]
    return jax.vmap(sums)(*stacks)


def _moments(p: Array, c: Array, r: Array) -> Array:
    terms = p * p, jnp.abs(p), c * c, p * c, r * r, _nonzero(c), _nonzero(r)
    *sums, nonzeros = leaf_sums(*terms)
    return jnp.stack([x.astype(jnp.float32) for x in (*sums, p.size - nonzeros)])


def _squared_norm(x: Array) -> Array:
    wide = x.astype(wide_dtype(x.dtype))
    return jnp.stack(leaf_sums(wide * wide)).astype(jnp.float32)


def _nonzero(x: Array) -> Array:
    """1 for entries that are not zero, else 0; by bits, which takes a third of a comparison."""
    integer = jnp.dtype(f"uint{bits_of(x.dtype)}")
    rest = np.asarray(jnp.iinfo(integer).max >> 1, integer)  # all bits but the sign
    magnitude = lax.bitcast_convert_type(x, integer) & rest
    return ((magnitude + rest) >> np.asarray(bits_of(x.dtype) - 1, integer)).astype(jnp.uint32)
