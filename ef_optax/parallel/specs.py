"""Partition specs: how parameters are split over model axes, and how the state is split then."""

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
from ef_optax._rules.stored import Stored
from ef_optax.parallel import inference
from ef_optax.parallel.worker_map import Sizes


def is_spec(x: Any) -> bool:
    """For ``is_leaf``: a spec is a tuple, but must count as a leaf."""
    return isinstance(x, P)


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
    """The specs of concrete parameters, empty for those that are not split."""

    def one(x: Any) -> P:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return _trimmed(sharding.spec)
        return P()

    return jax.tree.map(one, params)


def of(x: Any) -> P:
    """The spec in the type of an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
    spec = jax.typeof(x).sharding.spec
    return P() if spec is None else spec


def typed(params: Any) -> Any:
    """The specs of parameters on a mesh with Explicit axes, which are part of their types."""
    return jax.tree.map(lambda x: _trimmed(of(x)), params)


def by_path(params: Any, given: Any, axis_name: AxisName, sizes: Mapping[str, int]) -> dict[str, P]:
    """Leaf path -> spec over the model axes, whose sizes are given; refuses impossible specs.

    Raises:
      ValueError: for such a spec; the message has the parameter, its spec and the remedy.
    """
    found = _located(params, given)
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


def _located(params: Any, specs: Any) -> dict[str, P]:
    """Leaf path -> spec, from a tree (or prefix tree) of partition specs."""
    if not jax.tree.leaves(params):  # such as the placeholder of optax.tree.map_params
        return {}
    is_given = lambda x: x is None or is_spec(x)  # noqa: E731
    spread = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec or P(), part),
        specs,
        params,
        is_leaf=is_given,
    )
    located = jax.tree_util.tree_leaves_with_path(spread, is_leaf=is_given)
    return {context.path_string(path): spec for path, spec in located}


def over_model_axes(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: Sizes,
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

    def init(params: Any) -> Any:
        with context.lifting(context.Lift()):
            return tx.init(params)

    axes = list(zip(axis_names(axis_name), sizes, strict=True))
    try:
        with jax.sharding.use_abstract_mesh(abstract_mesh):
            _, state = jax.make_jaxpr(init, axis_env=axes, return_shape=True)(typed)
    except Exception:  # noqa: BLE001  (any type error of a third-party init: leave it unsplit)
        return jax.tree.map(lambda _: P(), local)
    return _with_codecs(jax.tree.map(lambda x: _trimmed(of(x)), state), local, lift)


def _with_codecs(specs: Any, local: Any, lift: context.Lift) -> Any:
    """Adds the specs of what codecs encode: their states, and the memories that they store.

    Those of split leaves have a leading axis of slices. Their tree structure is that of ``local``,
    because a slice's state may differ from a leaf's.
    """

    def one(path: Any, _: Any) -> P:
        name = context.path_string(path)
        owner = next((p for p in lift.specs if name == p or name.startswith(p + "/")), None)
        axes = context.spec_axes(lift.specs[owner]) if owner is not None else ()
        return P(axes) if axes else P()

    def in_exchange(spec: Any, state: Any) -> Any:
        if isinstance(state, Stored):
            path = (jax.tree_util.GetAttrKey(state.form.path),)
            return jax.tree.map(lambda x: one(path, x), state)
        if not isinstance(state, ExchangeState):
            return spec
        return spec._replace(codec=jax.tree_util.tree_map_with_path(one, state.codec))

    return jax.tree.map(
        in_exchange,
        specs,
        local,
        is_leaf=lambda x: isinstance(x, ExchangeState | Stored) or is_spec(x),
    )
