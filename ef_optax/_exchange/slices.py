"""Leaves that are split over model axes: each device compresses the slice it owns.

The lift is manual over the worker axis only, so that the Optax transformations around an exchange
keep their global meaning. Only the exchange itself opens a nested map over the model axes that the
leaves' partition specs name. It does so for all leaves together, so that one buffer still carries
them. In simulation ``vmap`` makes the same split, so that a laptop follows the trajectory of a pod.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange import collectives as coll
from ef_optax._numeric.dtypes import Array


def leaf_specs(paths: Sequence[str]) -> list[P] | None:
    """Each leaf's spec over the model axes, or None if no leaf is split here."""
    lift = context.current()
    if lift is None:
        return None
    manual = () if lift.simulated else jax.sharding.get_abstract_mesh().manual_axes
    specs = [lift.specs.get(path, P()) for path in paths]
    free = {a for spec in specs for a in context.spec_axes(spec)} - set(manual)
    return specs if free else None


def slice_count(spec: P) -> int:
    """Number of slices of a leaf with this spec."""
    sizes = _axis_sizes()
    return math.prod(sizes[a] for a in context.spec_axes(spec))


def slice_like(like: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one slice.

    Raises:
      ValueError: if a dimension is not divisible by its number of slices.
    """
    sizes, shape = _axis_sizes(), list(like.shape)
    for d, entry in enumerate(spec):
        parts = math.prod(sizes[a] for a in context.spec_axes(P(entry)))
        if shape[d] % parts:
            raise ValueError(
                f"param_specs: dimension {d} of a leaf of shape {like.shape} is split {parts} ways "
                f"by {spec}, which does not divide {shape[d]}; choose another spec for it."
            )
        shape[d] //= parts
    return jax.ShapeDtypeStruct(tuple(shape), like.dtype)


def whole_shape(shape: tuple[int, ...], spec: P) -> tuple[int, ...]:
    """The shape of a leaf whose slices have this shape; the inverse of :func:`slice_like`."""
    sizes = _axis_sizes()
    parts = [math.prod(sizes[a] for a in context.spec_axes(P(entry))) for entry in spec]
    return *(n * p for n, p in zip(shape, parts, strict=False)), *shape[len(parts) :]


def over_slices(
    send: Callable[..., tuple[dict[str, list[Array]], Any]],
    leaves: list[Array],
    states: list[Any],
    shared: Any,
    specs: list[P],
    names: Sequence[str],
) -> tuple[dict[str, list[Array]], Any]:
    """Runs ``send(leaves, states, shared, slice_indices)`` on every slice.

    Args:
      send: returns a dictionary of lists shaped like ``leaves``, and (states, rest) where ``rest``
        is the same on all slices.
      leaves: the leaves, before they are split.
      states: the codecs' states, with a leading slice axis for split leaves.
      shared: arrays that are the same on every slice (``send`` must not close over arrays).
      specs: one partition spec for each leaf.
      names: the keys of the dictionary that ``send`` returns.
    """
    lift = context.current()
    assert lift is not None
    free = sorted({a for spec in specs for a in context.spec_axes(spec)})
    run = _over_virtual_slices if lift.simulated else _over_devices
    return run(send, leaves, states, shared, specs, free, names)


def _axis_sizes() -> dict[str, int]:
    lift = context.current()
    assert lift is not None
    return dict(lift.axis_sizes)


def _with_slices(send: Any, specs: list[P]) -> Any:
    """Adapts ``send`` to the inside of a map, where codec states have no slice axis."""

    def local(leaves: list[Array], states: list[Any], shared: Any) -> Any:
        axes = [context.spec_axes(spec) for spec in specs]
        indices = [coll.axis_index(a) if a else 0 for a in axes]
        inner = [_first(s) if a else s for s, a in zip(states, axes, strict=True)]
        wanted, (after, rest) = send(leaves, inner, shared, indices)
        after = [_expand(s) if a else s for s, a in zip(after, axes, strict=True)]
        return wanted, (after, rest)

    return local


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _expand(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _over_devices(
    send: Any,
    leaves: list[Array],
    states: list[Any],
    shared: Any,
    specs: list[P],
    free: list[str],
    names: Sequence[str],
) -> Any:
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    lead = [P(context.spec_axes(s)) if context.spec_axes(s) else P() for s in specs]
    return jax.shard_map(
        _with_slices(send, specs),
        in_specs=(specs, lead, P()),
        out_specs=({name: specs for name in names}, (lead, P())),
        axis_names=set(free) - manual,
        check_vma=False,
    )(leaves, states, shared)


def _over_virtual_slices(
    send: Any,
    leaves: list[Array],
    states: list[Any],
    shared: Any,
    specs: list[P],
    free: list[str],
    names: Sequence[str],
) -> Any:
    sizes = _axis_sizes()
    cuts = [_Cut(spec, free, sizes) for spec in specs]

    def local(leaves: list[Array], states: list[Any], shared: Any) -> Any:
        return send(leaves, states, shared, [coll.axis_index(c.own) if c.own else 0 for c in cuts])

    for name in reversed(free):
        where = [0 if name in cut.own else None for cut in cuts]
        local = jax.vmap(local, (where, where, None), axis_name=name, axis_size=sizes[name])
    wanted, (after, rest) = local(
        [cut.split(x) for cut, x in zip(cuts, leaves, strict=True)],
        [cut.split_state(s) for cut, s in zip(cuts, states, strict=True)],
        shared,
    )
    joined = {
        name: [c.join(x, leaf.shape) for c, x, leaf in zip(cuts, wanted[name], leaves, strict=True)]
        for name in names
    }
    first = jax.tree.map(lambda x: x[(0,) * len(free)], rest)
    return joined, ([cut.join_state(s) for cut, s in zip(cuts, after, strict=True)], first)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How one leaf is cut into slices along leading axes.

    Attributes:
      spec: the leaf's partition spec.
      free: all model axes of the exchange, in the order of the maps over them.
      sizes: the number of slices along each axis.
    """

    spec: P
    free: Sequence[str]
    sizes: Mapping[str, int]

    @property
    def own(self) -> tuple[str, ...]:
        """The axes over which this leaf is split, in the order of its spec."""
        return context.spec_axes(self.spec)

    @property
    def order(self) -> list[int]:
        """The positions in ``own`` of its axes in the order of the maps."""
        return [self.own.index(name) for name in self.free if name in self.own]

    def split(self, x: Array) -> Array:
        """A leaf as its slices, with a leading dimension for each of its own axes."""
        if not self.own:
            return x
        shape: list[int] = []
        positions: list[int] = []  # of the own axes, in the shape with all dimensions cut
        for axes, length in self._dimensions(x.shape):
            positions += range(len(shape), len(shape) + len(axes))
            parts = [self.sizes[name] for name in axes]
            shape += [*parts, length // math.prod(parts)]
        sources = [positions[i] for i in self.order]
        return jnp.moveaxis(x.reshape(shape), sources, range(len(sources)))

    def join(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of :meth:`split`, for a result with a leading dimension per free axis."""
        positions: list[int] = []
        at = 0
        for axes, _ in self._dimensions(shape):
            positions += range(at, at + len(axes))
            at += len(axes) + 1
        targets = [positions[i] for i in self.order]
        return jnp.moveaxis(self._own(x), range(len(targets)), targets).reshape(shape)

    def split_state(self, state: Any) -> Any:
        """A codec's state with one leading axis for all slices, in the layout of :meth:`split`."""
        own, order = self.own, self.order

        def one(x: Array) -> Array:
            cut = x.reshape(*(self.sizes[name] for name in own), *x.shape[1:])
            return cut.transpose(*order, *range(len(own), cut.ndim))

        return jax.tree.map(one, state) if own else state

    def join_state(self, state: Any) -> Any:
        """The inverse of :meth:`split_state`, with a leading dimension per free axis."""
        own, order = self.own, self.order

        def one(x: Array) -> Array:
            x = self._own(x)
            if not own:
                return x
            x = x.transpose(*np.argsort(order), *range(len(own), x.ndim))
            return x.reshape(-1, *x.shape[len(own) :])

        return jax.tree.map(one, state)

    def _dimensions(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        """For each dimension, the axes over which it is split, and its length."""
        for d, length in enumerate(shape):
            yield context.spec_axes(P(self.spec[d] if d < len(self.spec) else None)), length

    def _own(self, x: Array) -> Array:
        """A result of all maps, without the axes over which it is the same."""
        return x[tuple(slice(None) if name in self.own else 0 for name in self.free)]
