"""Leaves that are split over model axes: each device compresses the slice it owns.

The lift is manual over the worker axis only, so that the Optax transformations around an exchange
keep their global meaning. Only the exchange itself opens a nested map over the model axes that the
leaves' partition specs name, all leaves together so that one buffer still carries them. In
simulation the same split is made with ``vmap``, so that a laptop follows the pod's trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange import collectives as coll
from ef_optax._numeric.dtypes import Array


def leaf_specs(paths: Sequence[str]) -> list[P] | None:
    """Each leaf's spec over the model axes, or None when no leaf is split here."""
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
      leaves: the whole leaves.
      states: the codecs' states, with a leading slice axis for split leaves.
      shared: arrays that are the same on every slice (nothing may be closed over).
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
    """Adapts ``send`` to the inside of a map: strips the slice axis of the codec states."""

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
    axes = [context.spec_axes(spec) for spec in specs]

    def split(x: Array, spec: P) -> Array:
        """Leading dimensions for the leaf's own model axes, in the order of ``free``."""
        shape, moves, names = [], [], []
        for d in range(x.ndim):
            entry = spec[d] if d < len(spec) else None
            for a in context.spec_axes(P(entry)):
                moves.append(len(shape))
                names.append(a)
                shape.append(sizes[a])
            parts = math.prod(sizes[a] for a in context.spec_axes(P(entry)))
            shape.append(x.shape[d] // parts)
        order = sorted(range(len(names)), key=lambda i: free.index(names[i]))
        return jnp.moveaxis(x.reshape(shape), [moves[i] for i in order], list(range(len(order))))

    def join(x: Array, spec: P, shape: tuple[int, ...]) -> Array:
        """The inverse of ``split`` for a result that has all of ``free`` as leading axes."""
        own = context.spec_axes(spec)
        x = x[tuple(slice(None) if a in own else 0 for a in free)]
        kept, targets, at = [a for a in free if a in own], {}, 0
        for d in range(len(shape)):
            for a in context.spec_axes(P(spec[d] if d < len(spec) else None)):
                targets[a] = at
                at += 1
            at += 1
        order = [targets[a] for a in kept]
        return jnp.moveaxis(x, list(range(len(kept))), order).reshape(shape)

    def state_in(tree: Any, own: tuple[str, ...]) -> Any:
        shape = tuple(sizes[a] for a in own)
        order = sorted(range(len(own)), key=lambda i: free.index(own[i]))
        return jax.tree.map(
            lambda x: x.reshape(*shape, *x.shape[1:]).transpose(
                *order, *range(len(own), len(own) + x.ndim - 1)
            ),
            tree,
        )

    def state_out(tree: Any, own: tuple[str, ...]) -> Any:
        kept = [a for a in free if a in own]
        order = [kept.index(a) for a in own]

        def one(x: Array) -> Array:
            x = x[tuple(slice(None) if a in own else 0 for a in free)]
            if not own:
                return x
            x = x.transpose(*order, *range(len(own), x.ndim))
            return x.reshape(-1, *x.shape[len(own) :])

        return jax.tree.map(one, tree)

    def local(leaves: list[Array], states: list[Any], shared: Any) -> Any:
        indices = [coll.axis_index(a) if a else 0 for a in axes]
        return send(leaves, states, shared, indices)

    mapped = local
    for name in reversed(free):
        where = [0 if name in a else None for a in axes]
        mapped = jax.vmap(
            mapped, in_axes=(where, where, None), axis_name=name, axis_size=sizes[name]
        )
    wanted, (after, rest) = mapped(
        [split(x, s) if a else x for x, s, a in zip(leaves, specs, axes, strict=True)],
        [state_in(s, a) if a else s for s, a in zip(states, axes, strict=True)],
        shared,
    )
    joined = {
        name: [join(x, s, leaf.shape) for x, s, leaf in zip(xs, specs, leaves, strict=True)]
        for name, xs in wanted.items()
    }
    first = jax.tree.map(lambda x: x[(0,) * len(free)], rest)
    return joined, ([state_out(s, a) for s, a in zip(after, axes, strict=True)], first)
