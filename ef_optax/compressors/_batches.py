"""Matrices of one shape as one batch, for codecs that get all leaves of an exchange together.

Small leaves share one product; large leaves are multiplied one by one, because stacking copies
them. Whatever is sent of a batch is one array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from ef_optax._exchange.stack import STACK_LIMIT
from ef_optax._numeric import offsets
from ef_optax._numeric.buffers import in_buffers
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.matrix import Matrices, low_rank_product
from ef_optax._numeric.shapes import size_of


@dataclasses.dataclass(frozen=True)
class Batch:
    """Leaves whose matrices have one shape; each of their factors is one array (count, ...)."""

    members: tuple[int, ...]  # positions in the list of leaves
    leads: tuple[tuple[int, ...], ...]  # the shapes of the members' batch axes
    parts: tuple[Array, ...]  # (count, rows, columns): all members stacked, or one part per member
    positions: Mapping[int, Array | int]  # where pieces begin, as data: equal ones share a program
    runtime: Array  # an integer scalar of the run time

    @property
    def _counts(self) -> list[int]:
        return [size_of(lead) for lead in self.leads]

    def gather(self, states: Sequence[Array] | dict[int, Array]) -> Array:
        """The factors of the members, by their positions, as one array."""
        own = [states[i].reshape(-1, *states[i].shape[-2:]) for i in self.members]
        return own[0] if len(own) == 1 else jnp.concatenate(own)

    def scatter(self, factor: Array) -> list[Array]:
        """The inverse of :meth:`gather`: a factor for each member, with its own batch axes."""
        pieces = self._split(factor, self._counts)
        return [f.reshape(*lead, *f.shape[1:]) for f, lead in zip(pieces, self.leads, strict=True)]

    def times(self, right: Array) -> Array:
        """``M Q``, from Q as (count, r, columns)."""
        return self._products("mrc,mkc->mrk", right)

    def transposed_times(self, left: Array) -> Array:
        """``M^T P`` as (count, r, columns); another order would read M by columns."""
        return self._products("mrc,mrk->mkc", left)

    def _products(self, subscripts: str, factor: Array) -> Array:
        pieces = zip(self.parts, self._pieces(factor), strict=True)
        products = [einsum(subscripts, part, f) for part, f in pieces]
        return products[0] if len(products) == 1 else jnp.concatenate(products)

    def minus(self, left: Array, right: Array) -> Batch:
        """The batch of ``M - P Q``."""
        parts = zip(self.parts, self._parts_of(left, right), strict=True)
        return dataclasses.replace(self, parts=tuple(a - b for a, b in parts))

    def values(self, left: Array, right: Array) -> list[Array]:
        """``P Q`` for each member, as (its count, rows, columns)."""
        return self.of_members(self._parts_of(left, right))

    def of_members(self, parts: Sequence[Array]) -> list[Array]:
        """Arrays like :attr:`parts`, as one (its count, rows, columns) for each member."""
        if len(parts) == len(self.members):
            return list(parts)
        return self._split(parts[0], self._counts)

    def rows(self, chosen: Array) -> Array:
        """The rows with these numbers, (count, k), of every matrix: (count, k, columns)."""
        pieces = zip(self.parts, self._pieces(chosen), strict=True)
        taken = [jnp.take_along_axis(part, rows[:, :, None], axis=1) for part, rows in pieces]
        return taken[0] if len(taken) == 1 else jnp.concatenate(taken)

    def add_rows(self, parts: Sequence[Array], chosen: Array, values: Array) -> list[Array]:
        """``parts``, arrays like :attr:`parts`, with values added to the rows of these numbers."""
        pieces = zip(parts, self._pieces(chosen), self._pieces(values), strict=True)
        return [
            part.at[jnp.arange(len(part))[:, None], rows].add(new) for part, rows, new in pieces
        ]

    def _pieces(self, x: Array) -> list[Array]:
        return self._split(x, [len(part) for part in self.parts])

    def _parts_of(self, left: Array, right: Array) -> list[Array]:
        pairs = zip(self._pieces(left), self._pieces(right), strict=True)
        return [low_rank_product(a, b) for a, b in pairs]

    def _split(self, x: Array, counts: Sequence[int]) -> list[Array]:
        if len(counts) == 1:
            return [x]
        starts = [self.positions[start] for start in offsets.begins(counts)]
        cuts = list(zip(starts, counts, strict=True))
        # What is cut while it is read takes longer to read.
        return in_buffers(lambda: [offsets.rows(x, *cut) for cut in cuts], self.runtime)


def joined(
    arrays: Sequence[Array],
) -> tuple[list[Array], Callable[[Sequence[Array]], list[Array]]]:
    """Arrays as one vector for each dtype, and the function that undoes it for such vectors.

    The compiler merges collectives, but not always those of one round: if it can send an array of
    the next round earlier, it merges this one with the rest of the present round. One vector must
    travel as a whole.

    >>> vectors, split = joined([jnp.ones((2, 2)), jnp.zeros(3)])
    >>> [x.shape for x in vectors], [x.shape for x in split(vectors)]
    ([(7,)], [(2, 2), (3,)])
    """
    groups: dict[jnp.dtype, list[int]] = {}
    for i, x in enumerate(arrays):
        groups.setdefault(x.dtype, []).append(i)
    vectors = [jnp.concatenate([arrays[i].reshape(-1) for i in own]) for own in groups.values()]

    def split(vectors: Sequence[Array]) -> list[Array]:
        pieces: dict[int, Array] = {}
        for own, vector in zip(groups.values(), vectors, strict=True):
            sizes = [arrays[i].size for i in own]
            parts = [vector[a : a + n] for a, n in zip(offsets.begins(sizes), sizes, strict=True)]
            pieces |= {i: x.reshape(arrays[i].shape) for i, x in zip(own, parts, strict=True)}
        return [pieces[i] for i in range(len(arrays))]

    return vectors, split


def batches_of(
    leaves: Sequence[Array], plans: Sequence[tuple[Matrices, int] | None], runtime: Array
) -> tuple[list[Batch], list[int]]:
    """The batches of the leaves that are compressed, and the positions of the dense ones.

    Args:
      leaves: the leaves of an exchange.
      plans: for each leaf its matrices and a number that members of one batch share (the rank of
        their factors, say), or None for a dense leaf.
      runtime: an integer scalar of the run time (see ``offsets.as_data``).
    """
    groups: dict[tuple[int, int, int, jnp.dtype], list[int]] = {}
    dense, leads = [], {}
    for i, (x, plan) in enumerate(zip(leaves, plans, strict=True)):
        if plan is None:
            dense.append(i)
            continue
        matrices, number = plan
        leads[i] = matrices.lead
        key = matrices.rows, matrices.columns, number, wide_dtype(x.dtype)
        groups.setdefault(key, []).append(i)
    counts = [[size_of(leads[i]) for i in members] for members in groups.values()]
    starts = sorted({start for own in counts for start in offsets.begins(own)})
    positions = dict(zip(starts, offsets.as_data(starts, runtime), strict=True))
    batches = []
    for (rows, columns, _, dtype), members in groups.items():
        parts = [leaves[i].astype(dtype).reshape(-1, rows, columns) for i in members]
        if len(parts) > 1 and rows * columns <= STACK_LIMIT:
            parts = [jnp.concatenate(parts)]
        lead = tuple(leads[i] for i in members)
        batches.append(Batch(tuple(members), lead, tuple(parts), positions, runtime))
    return batches, dense
