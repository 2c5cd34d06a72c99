"""The lift: one worker's transformation becomes one that takes a gradient from every worker.

``data_parallel`` (workers are devices of a mesh) and ``simulate`` (workers are a ``vmap`` axis)
have the same interface and follow the same trajectory:

    init(params)                    places and shapes the state
    update(grads, state, params)    grads have a leading worker axis and are not averaged

Leaves of the state that differ between workers get a leading worker axis; which ones is inferred
(see ``inference``). A step with a NaN or inf on any worker is skipped by all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ef_optax import _context
from ef_optax._collectives import AxisName, axis_names
from ef_optax._exchange import ExchangeState
from ef_optax.parallel import inference
from ef_optax.parallel.arguments import check_gradients, check_params, split_extra
from ef_optax.parallel.quarantine import keep_if_bad


class Lifted(optax.GradientTransformationExtraArgs):
    """A lifted transformation: the Optax pair, and what is known about its state.

    Attributes:
      axis_name: the worker axis. sizes: workers along each axis.
      worker_axes: ``worker_axes(params)`` tells which state leaves have a worker axis.
      state_specs: ``state_specs(params)`` gives the partition spec of each state leaf.
      abstract_state: ``abstract_state(params)`` gives shapes, dtypes and (on a mesh) shardings.
    """

    axis_name: AxisName
    sizes: inference.Sizes
    worker_axes: Callable[[Any], Any]
    state_specs: Callable[[Any], Any]
    abstract_state: Callable[[Any], Any]

    @property
    def num_workers(self) -> int:
        """The number of workers."""
        return inference.worker_count(self.sizes)


def _local_step(tx: optax.GradientTransformation, lift: _context.Lift) -> Callable[..., Any]:
    """One worker's update with the step's quarantine, inside the map."""
    inner = optax.with_extra_args_support(tx)

    def step(grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        with _context.lifting(lift):
            updates, new = inner.update(grads, state, params, **extra)
        return keep_if_bad(updates, new, state)

    return step


def _params_like(updates: Any, params: Any) -> Any:
    """Shapes of the parameters, from the gradients where no parameters are given."""
    if params is not None:
        return inference.abstract(params)
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), updates)


def simulate(
    tx: optax.GradientTransformation,
    num_workers: int | tuple[int, ...],
    axis_name: AxisName,
    *,
    param_specs: Any = None,
    model_axes: Mapping[str, int] | None = None,
    extra_args: dict[str, Any] | None = None,
) -> Lifted:
    """Runs all workers in one process: the worker axis is a ``vmap`` axis, no devices are needed.

    Args:
      tx: a chain that exchanges over ``axis_name``.
      num_workers: how many workers (one number for each axis of a tuple).
      axis_name: the name that ``tx`` uses for the worker axis.
      param_specs: partition specs of the parameters over ``model_axes``, to follow the trajectory
        of a mesh on which they are split (compression is per slice there).
      model_axes: name and size of each model axis that ``param_specs`` names.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A transformation with ``init(params)`` and ``update(grads, state, params)``, where each leaf
      of ``grads`` has a leading axis of ``num_workers`` and is not averaged; it emits one update.

    Raises:
      ValueError: if nothing in the chain exchanges, if updates differ between workers, or (at
        update) if gradients lack the worker axis.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(k=1), axis_name="data"), optax.sgd(1.0))
      >>> tx = ef.simulate(tx, 2, "data")
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([[3.0, 1.0], [1.0, 4.0]]), state, params)
      >>> updates.tolist(), state[0].residual.tolist()
      ([-1.5, -2.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    sizes = inference.sizes_of(axis_name, num_workers)
    n = inference.worker_count(sizes)
    infer = functools.partial(_infer, tx, axis_name, sizes, extra_args)

    def lift_of(params: Any) -> _context.Lift:
        specs = {} if param_specs is None else inference.path_specs(params, param_specs)
        return _context.Lift(specs, dict(model_axes or {}), simulated=True)

    def init_fn(params: Any) -> Any:
        check_params(params)
        lift = lift_of(params)
        flags = infer(params, lift)

        def one(_: Any) -> Any:
            with _context.lifting(lift):
                return tx.init(params)

        bound = inference.bind_axes(one, axis_name, sizes, 0, 0)
        whole = bound(jnp.zeros(sizes, jnp.int32))
        skip = len(sizes)
        return jax.tree.map(
            lambda x, flag: x.reshape(n, *x.shape[skip:]) if flag else x[(0,) * skip], whole, flags
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_gradients(updates, params, n, axis_name)
        lift = lift_of(_params_like(updates, params))
        flags = _flags(tx, axis_name, sizes, lift, _params_like(updates, params), state)
        traced, marks, fixed = split_extra(extra_args, n)
        axes = jax.tree.map(lambda f: 0 if f else None, (flags, marks))
        step = _local_step(tx, lift)

        def one(g: Any, s: Any, p: Any, x: Any) -> Any:
            return step(g, s, p, {**x, **fixed})

        bound = inference.bind_axes(
            one, axis_name, sizes, (0, axes[0], None, axes[1]), (None, axes[0])
        )
        fold = functools.partial(_fold, sizes=sizes)
        emitted, after = bound(
            jax.tree.map(lambda x: fold(x, True), updates),
            jax.tree.map(fold, state, flags),
            params,
            jax.tree.map(fold, traced, marks),
        )
        after = jax.tree.map(
            lambda x, flag: x.reshape(n, *x.shape[len(sizes) :]) if flag else x, after, flags
        )
        return emitted, after

    lifted = Lifted(init_fn, update_fn)
    lifted.axis_name, lifted.sizes = axis_name, sizes
    lifted.worker_axes = lambda params: infer(params, lift_of(params))
    lifted.state_specs = lambda params: jax.tree.map(
        lambda flag: P(axis_name) if flag else P(), lifted.worker_axes(params)
    )
    lifted.abstract_state = lambda params: jax.eval_shape(init_fn, params)
    return lifted


def _fold(x: Any, flag: bool, sizes: inference.Sizes) -> Any:
    """The leading worker axis as one dimension for each of its mesh axes."""
    return x.reshape(*sizes, *x.shape[1:]) if flag and len(sizes) > 1 else x


def _infer(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    sizes: inference.Sizes,
    extra_args: dict[str, Any] | None,
    params: Any,
    lift: _context.Lift,
) -> Any:
    """The flags of the state; model axes are emulated, so that no device is needed."""
    virtual = _context.Lift(lift.specs, lift.axis_sizes, simulated=True)
    with _context.lifting(virtual):
        return inference.worker_axes(tx, params, axis_name, sizes, extra_args=extra_args)


def _flags(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: _context.Lift,
    params: Any,
    state: Any,
) -> Any:
    virtual = _context.Lift(lift.specs, lift.axis_sizes, simulated=True)
    with _context.lifting(virtual):
        local = inference.local_state(tx, params, axis_name, sizes)
    return inference.leading_flags(local, state)


def data_parallel(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis_name: AxisName,
    param_specs: Any = None,
    *,
    extra_args: dict[str, Any] | None = None,
) -> Lifted:
    """Lifts one worker's transformation to a mesh: the workers are the devices along an axis.

    The lift is manual over the worker axis only: model axes stay automatic, so what stands after
    the exchange keeps its global meaning (``clip_by_global_norm`` sees the whole norm), and each
    device compresses only the slice of a parameter that it owns.

    Args:
      tx: a chain that exchanges over ``axis_name``.
      mesh: the device mesh; its axes may be Auto or Explicit.
      axis_name: the mesh axis (or tuple of axes) along which workers lie.
      param_specs: partition specs of the parameters over the other axes, a tree or prefix tree as
        for ``in_specs``. None reads them from the parameters' shardings in ``init``; inside jit on
        an Auto mesh nothing can be read, so pass them when parameters are split.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A transformation with ``init(params)``, which places the state, and
      ``update(grads, state, params)``: each leaf of ``grads`` has a leading axis of n workers, not
      averaged (see :func:`worker_value_and_grad`). Extra arguments are replicated unless wrapped
      in :class:`PerWorker`; ``grads=`` (gradients at query points) is per worker.

    Raises:
      ValueError: if ``axis_name`` is not in the mesh, if nothing in the chain exchanges, if updates
        differ between workers, or (at update) if gradients lack the worker axis.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp, optax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(0.01), axis_name="data"), optax.adam(1e-3))
      >>> tx = ef.data_parallel(tx, mesh, "data")
      >>> state = tx.init({"w": jnp.zeros((8, 4))})
      >>> state[0].residual["w"].shape == (jax.device_count(), 8, 4)
      True
    """
    sizes = _mesh_sizes(mesh, axis_name)
    n = inference.worker_count(sizes)
    infer = functools.partial(_infer, tx, axis_name, sizes, extra_args)
    known: dict[str, Any] = {"specs": param_specs}
    over = functools.partial(_over_mesh, mesh, axis_name)

    def lift_of(params: Any) -> _context.Lift:
        specs = _param_specs(params, known["specs"], mesh)
        others = {a: s for a, s in mesh.shape.items() if a not in axis_names(axis_name)}
        return _context.Lift(inference.path_specs(params, specs), others)

    def specs_of(params: Any) -> Any:
        lift = lift_of(params)
        flags = infer(params, lift)
        return flags, _state_specs(tx, params, axis_name, sizes, lift, flags)

    def init_fn(params: Any) -> Any:
        check_params(params)
        if known["specs"] is None and not _abstract(params):
            known["specs"] = _concrete_specs(params, mesh)
        lift = lift_of(params)
        flags, specs = specs_of(params)

        def local(params: Any) -> Any:
            with _context.lifting(lift):
                state = tx.init(params)
            return jax.tree.map(lambda x, flag: x[None] if flag else x, state, flags)

        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=_is_spec)
        body = over(local, (P(),), _worker_specs(flags, axis_name), shardings)
        with jax.set_mesh(mesh) if _explicit(mesh) else _nothing():
            return jax.jit(body, out_shardings=shardings)(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_gradients(updates, params, n, axis_name)
        like = _params_like(updates, params)
        lift = lift_of(like if params is None else params)
        flags = _flags(tx, axis_name, sizes, lift, like, state)
        traced, marks, fixed = split_extra(extra_args, n)
        step = _local_step(tx, lift)
        strip = lambda x, flag: x[0] if flag else x  # noqa: E731

        def local(g: Any, s: Any, p: Any, x: Any) -> Any:
            g = jax.tree.map(lambda leaf: leaf[0], g)
            x = jax.tree.map(strip, x, marks)
            emitted, after = step(g, jax.tree.map(strip, s, flags), p, {**x, **fixed})
            return emitted, jax.tree.map(lambda y, f: y[None] if f else y, after, flags)

        state_specs = _worker_specs(flags, axis_name)
        shardings = None
        if _explicit(mesh):
            full = _state_specs(tx, like, axis_name, sizes, lift, flags)
            of_params = jax.tree_util.tree_map_with_path(
                lambda path, _: lift.specs.get(_context.path_string(path), P()), like
            )
            shardings = jax.tree.map(
                lambda s: NamedSharding(mesh, s), (of_params, full), is_leaf=_is_spec
            )
        body = over(
            local,
            (P(axis_name), state_specs, P(), _worker_specs(marks, axis_name)),
            (P(), state_specs),
            shardings,
        )
        return jax.jit(body)(updates, state, params, traced)

    lifted = Lifted(init_fn, update_fn)
    lifted.axis_name, lifted.sizes = axis_name, sizes
    lifted.worker_axes = lambda params: infer(params, lift_of(params))
    lifted.state_specs = lambda params: specs_of(params)[1]
    lifted.abstract_state = lambda params: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)),
        jax.eval_shape(init_fn, params),
        specs_of(params)[1],
    )
    return lifted


# ---------------------------------------------------------------------------- the mesh


def _over_mesh(
    mesh: Mesh,
    axis_name: AxisName,
    fun: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    shardings: Any,
) -> Callable[..., Any]:
    """``fun`` as a map that is manual over the worker axis only, on Auto and Explicit meshes."""
    manual = set(axis_names(axis_name))
    if not _explicit(mesh):
        return jax.shard_map(
            fun,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=manual,
            check_vma=False,
        )

    def body(*args: Any) -> Any:  # the mesh comes from the context, where its axes are Auto now
        return jax.shard_map(
            fun, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False
        )(*args)

    return jax.sharding.auto_axes(body, out_sharding=shardings)


def _mesh_sizes(mesh: Mesh, axis_name: AxisName) -> inference.Sizes:
    names = axis_names(axis_name)
    missing = [a for a in names if a not in mesh.axis_names]
    if missing or not names:
        raise ValueError(
            f"axis_name={axis_name!r} must name axes of the mesh, which has {mesh.axis_names}."
        )
    return tuple(mesh.shape[a] for a in names)


def _explicit(mesh: Mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _worker_specs(flags: Any, axis_name: AxisName) -> Any:
    return jax.tree.map(lambda flag: P(axis_name) if flag else P(), flags)


def _abstract(params: Any) -> bool:
    return any(
        isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)
    )


def _trimmed(spec: P) -> P:
    """The spec without trailing Nones, which would make equal shardings look different."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _concrete_specs(params: Any, mesh: Mesh) -> Any:
    """The specs of concrete parameters, None where there is nothing split."""

    def one(x: Any) -> P:
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return _trimmed(sharding.spec)
        return P()

    return jax.tree.map(one, params)


def _param_specs(params: Any, given: Any, mesh: Mesh) -> Any:
    """The partition specs of the parameters: given, or read from their types."""
    if given is not None:
        return given
    if _explicit(mesh):
        return jax.tree.map(lambda x: _trimmed(_typed_spec(x)), params)
    return _concrete_specs(params, mesh)


def _typed_spec(x: Any) -> P:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
    spec = jax.typeof(x).sharding.spec
    return P() if spec is None else spec


def _state_specs(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: _context.Lift,
    flags: Any,
) -> Any:
    """The full spec of each state leaf: the worker axis, then as its parameter is split."""
    own = _model_specs(tx, params, axis_name, sizes, lift)
    own = jax.tree_util.tree_map(lambda x: x, own, is_leaf=_is_spec)
    return jax.tree.map(lambda flag, spec: P(axis_name, *spec) if flag else spec, flags, own)


def _model_specs(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: inference.Sizes,
    lift: _context.Lift,
) -> Any:
    """How the state is split over the model axes, read from the types of ``tx.init``.

    ``init`` is traced on an abstract mesh whose axes are Explicit, where types carry shardings. An
    init that does not type-check there (``optax.flatten``) leaves its state unsplit.
    """
    virtual = _context.Lift(lift.specs, lift.axis_sizes, simulated=True)
    with _context.lifting(virtual):
        local = inference.local_state(tx, inference.abstract(params), axis_name, sizes)
    split = {a for spec in lift.specs.values() for a in _context.spec_axes(spec)}
    if not split:
        return jax.tree.map(lambda _: P(), local)
    names = tuple(lift.axis_sizes)
    mesh = AbstractMesh(
        tuple(lift.axis_sizes[a] for a in names),
        names,
        axis_types=(AxisType.Explicit,) * len(names),
    )
    typed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, lift.specs.get(_context.path_string(path), P())),
        ),
        inference.abstract(params),
    )

    def init(params: Any, _: Any) -> Any:
        with _context.lifting(_context.Lift()):
            return tx.init(params)

    bound = inference.bind_axes(init, axis_name, sizes, (None, 0), 0)
    index = jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=NamedSharding(mesh, P()))
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            state = jax.eval_shape(bound, typed, index)
    except Exception:  # noqa: BLE001  (any type error of a third-party init: leave it unsplit)
        return jax.tree.map(lambda _: P(), local)
    skip = len(sizes)
    specs = jax.tree.map(lambda x: _trimmed(P(*list(x.sharding.spec)[skip:])), state)
    return _codec_specs(specs, lift)


def _codec_specs(specs: Any, lift: _context.Lift) -> Any:
    """A codec's own state of a split leaf has one leading axis over the leaf's slices."""

    def in_exchange(state: Any) -> Any:
        if not isinstance(state, ExchangeState):
            return state

        def one(path: Any, spec: P) -> P:
            name = _context.path_string(path)
            owner = next((p for p in lift.specs if name == p or name.startswith(p + "/")), None)
            axes = _context.spec_axes(lift.specs[owner]) if owner is not None else ()
            return P(axes) if axes else spec

        codec = jax.tree_util.tree_map_with_path(one, state.codec, is_leaf=_is_spec)
        return state._replace(codec=codec)

    return jax.tree.map(
        in_exchange, specs, is_leaf=lambda x: isinstance(x, ExchangeState) or _is_spec(x)
    )
