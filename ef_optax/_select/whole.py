"""A list of leaves as one vector: its largest entries, and sums at given entries.

There are two forms of everything. *In place*, each leaf is read and written where it lies
(`ef_optax._select.tree`, `ef_optax._select.flat_view`). *Joined*, the leaves are copied into one
vector, and its parts copied out. Both give the same to the bit. The first is used on a CPU for
large models and few workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ef_optax._numeric import offsets
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.reductions import UNROLL_LIMIT
from ef_optax._select import flat_view
from ef_optax._select import leaf as leaf_select
from ef_optax._select import tree as tree_select

# Below this many entries in all, copies are cheaper than visits.
IN_PLACE_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Whole:
    """The vector of all entries, leaf after leaf.

    Attributes:
      likes: shape and dtype of each leaf.
      dtype: what entries of leaves are compared and sent in.
      witness: an integer scalar that is computed at run time (see `ef_optax._numeric.offsets`).
    """

    likes: tuple[jax.ShapeDtypeStruct, ...]
    dtype: Any
    witness: Array

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each leaf."""
        return tuple(like.size for like in self.likes)

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(self.sizes)

    def top_k(self, xs: Sequence[Array], k: int) -> tuple[Array, Array]:
        """Indices and entries of the ``k`` largest magnitudes, ascending.

        Ties go to the earlier leaf and the lower index.
        """

        def in_place(xs: Sequence[Array], witness: Array) -> tuple[Array, Array]:
            return tree_select.top_k(xs, k, self._rows(witness), self.dtype)

        def joined(xs: Sequence[Array], witness: Array) -> tuple[Array, Array]:
            del witness
            flat = flat_view.join(xs, self.dtype)
            indices, values = leaf_select.top_k(flat, k)
            return indices.astype(jnp.uint32), values

        return self._run(
            in_place, joined, xs, suits=lambda: tree_select.plan(self.sizes, k) is not None
        )

    def add(self, xs: Sequence[Array], indices: Array, values: Array) -> list[Array]:
        """The leaves with ``values`` of shape (n, k) added at ``indices``, each row ascending."""

        def in_place(
            xs: Sequence[Array], indices: Array, values: Array, witness: Array
        ) -> list[Array]:
            return flat_view.add(xs, self._layout(witness), indices, values)

        def joined(
            xs: Sequence[Array], indices: Array, values: Array, witness: Array
        ) -> list[Array]:
            del witness
            if {x.dtype for x in xs} == {values.dtype}:
                added = _sum_at(flat_view.join(xs, values.dtype), indices, values)
                return flat_view.split(added, xs)
            # Each leaf in its own dtype: what is not touched is not rounded.
            change = _sum_at(jnp.zeros(self.size, values.dtype), indices, values)
            parts = flat_view.split(change, xs)
            return [x + part for x, part in zip(xs, parts, strict=True)]

        return self._run(
            in_place, joined, xs, indices, values, suits=lambda: len(indices) <= UNROLL_LIMIT
        )

    def scatter(self, indices: Array, values: Array) -> list[Array]:
        """Leaves that are zero but for the sums of ``values`` at ``indices``, as in `add`."""

        def in_place(indices: Array, values: Array, witness: Array) -> list[Array]:
            layout = self._layout(witness + (indices[0, 0] & 0).astype(witness.dtype))
            # A zero of its own for each leaf, which varies over the mesh as the indices do. Equal
            # ones would be made once and copied.
            zeros = [
                jnp.broadcast_to(jnp.asarray(row >> 31, values.dtype), like.shape)
                for like, row in zip(self.likes, layout.rows, strict=False)
            ]
            return flat_view.add(zeros, layout, indices, values)

        def joined(indices: Array, values: Array, witness: Array) -> list[Array]:
            del witness
            flat = _sum_at(jnp.zeros(self.size, values.dtype), indices, values)
            shapes = [jax.ShapeDtypeStruct(like.shape, values.dtype) for like in self.likes]
            return flat_view.split(flat, shapes)

        leaves = self._run(
            in_place, joined, indices, values, suits=lambda: len(indices) <= UNROLL_LIMIT
        )
        return [x.astype(like.dtype) for x, like in zip(leaves, self.likes, strict=True)]

    def _run(
        self,
        in_place: Callable[..., Any],
        joined: Callable[..., Any],
        *arguments: Any,
        suits: Callable[[], bool],
    ) -> Any:
        if self.size < IN_PLACE_SIZE or not suits():
            return joined(*arguments, self.witness)
        return _chosen(in_place, joined)(*arguments, jnp.asarray(self.witness))

    def _rows(self, witness: Array) -> Sequence[Array | int]:
        return offsets.as_data(range(len(self.likes) + 1), witness)

    def _layout(self, witness: Array) -> flat_view.Layout:
        return flat_view.Layout(self.sizes, self._rows(witness))


def _sum_at(vector: Array, indices: Array, values: Array) -> Array:
    return vector.at[indices.reshape(-1)].add(values.reshape(-1), mode="drop")


def _chosen(in_place: Callable[..., Any], joined: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays in two forms: ``in_place`` on a CPU, ``joined`` elsewhere.

    Leaf by leaf there are loops whose length is known at run time only: many small steps, where an
    accelerator does better with one copy. And `jax.vmap` makes of a loop that differs between its
    rows one that writes every leaf anew at each turn. So both get the form that copies.
    """

    @jax.custom_batching.custom_vmap
    def run(*args: Any) -> Any:
        return lax.platform_dependent(*args, cpu=in_place, default=joined)

    @run.def_vmap
    def _(size: int, batched: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        del size
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(batched))
        out = jax.vmap(joined, in_axes=axes)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return run
