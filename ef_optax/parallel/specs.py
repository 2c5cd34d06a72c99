"""Partition specs: how parameters are split over model axes, and how the state follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._exchange.exchange import ExchangeState
from ef_optax.parallel import inference


def is_explicit(mesh: Mesh) -> bool:
    """Whether some axis of the mesh is Explicit, so that types carry shardings."""
    return AxisType.Explicit in mesh.axis_types


def is_spec(x: Any) -> bool:
    """For ``is_leaf``: a spec is a tuple, but a leaf."""
    return isinstance(x, P)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of specs as shardings of the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=is_spec)


def of_workers(flags: Any, axis_name: AxisName) -> Any:
    """The spec over the worker axis alone."""
    return jax.tree.map(lambda flag: P(axis_name) if flag else P(), flags)


def is_traced(params: Any) -> bool:
    """Whether any leaf is a tracer, whose sharding cannot be read on an Auto mesh."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(params))


def _trimmed(spec: P) -> P:
    """The spec without trailing Nones, which would make equal shardings look different."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def concrete(params: Any, mesh: Mesh) -> Any:
    """The specs of concrete parameters, None where there is nothing split."""

    def one(x: Any) -> P:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return _trimmed(sharding.spec)
        return P()

    return jax.tree.map(one, params)


def of_params(params: Any, given: Any, mesh: Mesh) -> Any:
    """The partition specs of the parameters: given, or read from their types."""
    if given is not None:
        return given
    if is_explicit(mesh):
        return jax.tree.map(lambda x: _trimmed(_typed_spec(x)), params)
    return concrete(params, mesh)


def by_path(params: Any, given: Any, axis_name: AxisName, sizes: Mapping[str, int]) -> dict[str, P]:
    """Leaf path -> spec over the model axes, whose sizes are given; refuses what cannot be.

    Raises:
      ValueError: naming the parameter, its spec and the remedy.
    """
    found = inference.path_specs(params, given)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, shape = context.path_string(path), jnp.shape(leaf)
        spec = found.get(name, P())
        what = f"params['{name}'] of shape {shape} has the spec {spec}"
        if len(spec) > len(shape):
            raise ValueError(f"{what}, which has more entries than the parameter has dimensions.")
        for size, entry in zip(shape, spec, strict=False):
            axes = context.spec_axes(P(entry))
            for axis in axes:
                if axis in axis_names(axis_name):
                    raise ValueError(
                        f"{what}, which splits it over the worker axis {axis!r}, but every worker "
                        "needs all of it; replicate it over that axis (jax.device_put(params, "
                        "NamedSharding(mesh, P()))) and split it over other axes of the mesh."
                    )
                if axis not in sizes:
                    raise ValueError(f"{what}; the model axes are {tuple(sizes)}.")
            parts = math.prod(sizes[axis] for axis in axes)
            if size % parts:
                raise ValueError(f"{what}, but {size} entries cannot be split in {parts} parts.")
    return found


def _typed_spec(x: Any) -> P:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
    spec = jax.typeof(x).sharding.spec
    return P() if spec is None else spec


def of_state(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: context.Lift,
    flags: Any,
    mesh: Mesh,
) -> Any:
    """The full spec of each state leaf: the worker axis, then as its parameter is split."""
    with context.lifting(lift.virtual()):
        local = inference.local_state(tx, inference.abstract(params), axis_name, sizes)
    own = _model_specs(tx, params, axis_name, sizes, lift, mesh, local)

    def full(flag: bool, spec: P, like: jax.ShapeDtypeStruct) -> P:
        if not like.size:
            return P()  # where XLA puts what is empty; elsewhere the second step would recompile
        return P(axis_name, *spec) if flag else spec

    return jax.tree.map(full, flags, own, local)


def _model_specs(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: context.Lift,
    mesh: Mesh,
    local: Any,
) -> Any:
    """How the state is split over the model axes, read from the types of ``tx.init``.

    ``init`` is traced on an abstract mesh whose axes are Explicit, where types carry shardings. An
    init that does not type-check there (``optax.flatten``) leaves its state unsplit.
    """
    split = {a for spec in lift.specs.values() for a in context.spec_axes(spec)}
    if not split:
        return jax.tree.map(lambda _: P(), local)
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    abstract_mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    typed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(abstract_mesh, lift.specs.get(context.path_string(path), P())),
        ),
        inference.abstract(params),
    )

    def init(params: Any, _: Any) -> Any:
        with context.lifting(context.Lift()):
            return tx.init(params)

    bound = inference.bind_axes(init, axis_name, sizes, (None, 0), 0)
    index = jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=NamedSharding(abstract_mesh, P()))
    try:
        with jax.sharding.use_abstract_mesh(abstract_mesh):
            state = jax.eval_shape(bound, typed, index)
    except Exception:  # noqa: BLE001  (any type error of a third-party init: leave it unsplit)
        return jax.tree.map(lambda _: P(), local)
    skip = len(sizes)
    specs = jax.tree.map(lambda x: _trimmed(P(*list(_typed_spec(x))[skip:])), state)
    return _codec_specs(specs, lift)


def _codec_specs(specs: Any, lift: context.Lift) -> Any:
    """A codec's own state of a split leaf has one leading axis over the leaf's slices."""

    def in_exchange(state: Any) -> Any:
        if not isinstance(state, ExchangeState):
            return state

        def one(path: Any, spec: P) -> P:
            name = context.path_string(path)
            owner = next((p for p in lift.specs if name == p or name.startswith(p + "/")), None)
            axes = context.spec_axes(lift.specs[owner]) if owner is not None else ()
            return P(axes) if axes else spec

        codec = jax.tree_util.tree_map_with_path(one, state.codec, is_leaf=is_spec)
        return state._replace(codec=codec)

    return jax.tree.map(
        in_exchange, specs, is_leaf=lambda x: isinstance(x, ExchangeState) or is_spec(x)
    )
