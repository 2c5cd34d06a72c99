"""Sums over what goes into a compressor and what comes out, in one pass over each leaf."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ef_optax._numeric.dtypes import Array, wide_dtype
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


def moments(
    inputs: Sequence[Array], sent: Sequence[Array], errors: Sequence[Array], *, local: bool
) -> list[Array]:
    """The sums ``MOMENTS`` of every leaf.

    Args:
      inputs: p, any shapes, float32 or float64.
      sent: c, of the same shapes.
      errors: p - c.
      local: whether each array lies on a single device, so that it may be flattened and stacked.

    Returns:
      A float32 vector for each leaf.

    >>> p, c = jnp.array([3.0, -1.0, 0.0]), jnp.array([3.0, 0.0, 0.0])
    >>> moments([p], [c], [p - c], local=True)[0].tolist()
    [10.0, 4.0, 9.0, 9.0, 1.0, 1.0, 2.0]
    """
    rows: list[Array] = [jnp.zeros(len(MOMENTS), jnp.float32)] * len(inputs)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(inputs):
        alone = not local or x.size > _SMALL
        groups.setdefault((x.dtype, x.size, i if alone else None), []).append(i)
    for (_, size, _), members in groups.items():
        if not local:
            for i in members:
                rows[i] = _of_split_leaf(inputs[i], sent[i], errors[i])
        elif size:
            stacks = [
                jnp.stack([xs[i].reshape(-1) for i in members]) for xs in (inputs, sent, errors)
            ]
            found = _of_stack(*stacks)
            for row, i in enumerate(members):
                rows[i] = found[row]
    return rows


def squared_norm(x: Array) -> Array:
    """The sum of squares as a float32 scalar, for leaves that may be split over devices."""
    wide = lax.convert_element_type(x, wide_dtype(x.dtype))
    total = lax.reduce(lax.mul(wide, wide), np.zeros((), wide.dtype), lax.add, tuple(range(x.ndim)))
    return total.astype(jnp.float32)


def _terms(p: Array, c: Array, r: Array) -> tuple[Array, ...]:
    ones = (c != 0).astype(p.dtype), (r == 0).astype(p.dtype)
    return p * p, jnp.abs(p), c * c, p * c, r * r, *ones


@jax.jit
def _of_stack(p: Array, c: Array, r: Array) -> Array:
    """The sums of several leaves of one size, which are the rows of the arguments."""

    def one(p: Array, c: Array, r: Array) -> Array:
        return jnp.stack(leaf_sums(*_terms(p, c, r))).astype(jnp.float32)

    return one(p[0], c[0], r[0])[None] if p.shape[0] == 1 else jax.vmap(one)(p, c, r)


@jax.jit
def _of_split_leaf(p: Array, c: Array, r: Array) -> Array:
    """The sums of a leaf that must keep its shape, because its dimensions lie on devices."""
    return jnp.stack([jnp.sum(x) for x in _terms(p, c, r)]).astype(jnp.float32)
