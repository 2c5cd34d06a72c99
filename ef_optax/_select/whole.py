"""A list of leaves as one vector: its largest entries, and sums at given entries.

Every function has two forms. *In place*, it reads and writes each leaf without a copy
(`ef_optax._select.tree`, `ef_optax._select.flat_view`). *Joined*, it copies the leaves into one
vector, and the parts of this back. Both give the same result to the bit. The first form is used on
a CPU, for large models and few workers.
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

# With fewer entries than this in total, copying the leaves is cheaper than visiting them.
IN_PLACE_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Whole:
    """The vector of all entries, leaf after leaf.

    Attributes:
      likes: shape and dtype of each leaf.
      dtype: the dtype in which entries are compared and sent.
      runtime: an integer scalar that is computed at run time (see `ef_optax._numeric.offsets`).
    """

    likes: tuple[jax.ShapeDtypeStruct, ...]
    dtype: Any
    runtime: Array

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

        def in_place(xs: Sequence[Array], runtime: Array) -> tuple[Array, Array]:
            return tree_select.top_k(xs, k, self._rows(runtime), self.dtype)

        def joined(xs: Sequence[Array], runtime: Array) -> tuple[Array, Array]:
            del runtime
            flat = flat_view.join(xs, self.dtype)
            indices, values = leaf_select.top_k(flat, k)
            return indices.astype(jnp.uint32), values

        return self._run(
            in_place, joined, xs, suits=lambda: tree_select.plan(self.sizes, k) is not None
        )

    def add(self, xs: Sequence[Array], indices: Array, values: Array) -> list[Array]:
        """The leaves with ``values`` of shape (n, k) added at ``indices``, each row ascending."""

        def in_place(
            xs: Sequence[Array], indices: Array, values: Array, runtime: Array
        ) -> list[Array]:
            return flat_view.add(xs, self._layout(runtime), indices, values)

        def joined(
            xs: Sequence[Array], indices: Array, values: Array, runtime: Array
        ) -> list[Array]:
            del runtime
            if {x.dtype for x in xs} == {values.dtype}:
                added = _sum_at(flat_view.join(xs, values.dtype), indices, values)
                return flat_view.split(added, xs)
            # Each leaf is added to in its own dtype, as in place.
            change = _sum_at(jnp.zeros(self.size, values.dtype), indices, values)
            parts = flat_view.split(change, xs)
            return [x + part for x, part in zip(xs, parts, strict=True)]

        return self._run(
            in_place, joined, xs, indices, values, suits=lambda: len(indices) <= UNROLL_LIMIT
        )

    def scatter(self, indices: Array, values: Array) -> list[Array]:
        """Leaves that are zero except for the sums of ``values`` at ``indices``, as in `add`."""

        def in_place(indices: Array, values: Array, runtime: Array) -> list[Array]:
            layout = self._layout(runtime + (indices[0, 0] & 0).astype(runtime.dtype))
            # Each leaf has its own zero, which varies over the mesh as the indices do. Equal zeros
            # would be made once and copied.
            zeros = [
                jnp.broadcast_to(jnp.asarray(row >> 31, values.dtype), like.shape)
                for like, row in zip(self.likes, layout.rows, strict=False)
            ]
            return flat_view.add(zeros, layout, indices, values)

        def joined(indices: Array, values: Array, runtime: Array) -> list[Array]:
            del runtime
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
            return joined(*arguments, self.runtime)
        return _chosen(in_place, joined)(*arguments, jnp.asarray(self.runtime))

    def _rows(self, runtime: Array) -> Sequence[Array | int]:
        return offsets.as_data(range(len(self.likes) + 1), runtime)

    def _layout(self, runtime: Array) -> flat_view.Layout:
        return flat_view.Layout(self.sizes, self._rows(runtime))


def _sum_at(vector: Array, indices: Array, values: Array) -> Array:
    return vector.at[indices.reshape(-1)].add(values.reshape(-1), mode="drop")


def _chosen(in_place: Callable[..., Any], joined: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays in two forms: ``in_place`` on a CPU, ``joined`` elsewhere.

    The form in place has a loop for each leaf, whose length is known only at run time. On an
    accelerator one copy is faster than its many small steps. And if the length differs between the
    rows of a `jax.vmap`, the loop rewrites the leaf in each iteration. So both use the form that
    copies.
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
