"""Workers as devices: the lift to a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._numeric import check
from ef_optax.parallel import inference, specs
from ef_optax.parallel.arguments import all_arrays, check_gradients, check_params, split_extra
from ef_optax.parallel.lift import Lifted, flags_of, infer_flags, local_step, params_like


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
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(0.01), axis_name="data"), optax.sgd(0.1))
      >>> tx = ef.data_parallel(tx, mesh, "data")
      >>> state = tx.init({"w": jnp.zeros((8, 4))})
      >>> state[0].residual["w"].shape == (jax.device_count(), 8, 4)
      True
    """
    sizes = mesh_sizes(mesh, axis_name)
    n = inference.worker_count(sizes)
    example = extra_args
    infer = functools.partial(infer_flags, tx, axis_name, sizes, extra_args)
    noted: dict[Any, Any] = {}  # structure of params -> their specs
    over = functools.partial(over_mesh, mesh, axis_name)

    def lift_of(params: Any) -> context.Lift:
        known = noted.get(jax.tree.structure(params)) if param_specs is None else param_specs
        given = specs.of_params(params, known, mesh)
        others = {a: s for a, s in mesh.shape.items() if a not in axis_names(axis_name)}
        return context.Lift(specs.by_path(params, given, axis_name, others), others)

    def remember(params: Any) -> None:
        """Inside jit on an Auto mesh shardings cannot be read, so they are noted when they can."""
        if not specs.is_traced(params):
            noted[jax.tree.structure(params)] = specs.concrete(params, mesh)

    def specs_of(params: Any) -> Any:
        lift = lift_of(params)
        flags = infer(params, lift)
        return flags, specs.of_state(tx, params, axis_name, sizes, lift, flags, mesh)

    def init_fn(params: Any) -> Any:
        check_params(params)
        remember(params)
        lift = lift_of(params)
        flags, full = specs_of(params)

        def local(params: Any) -> Any:
            with context.lifting(lift):
                state = tx.init(params)
            return jax.tree.map(lambda x, flag: x[None] if flag else x, state, flags)

        shardings = specs.shardings(full, mesh)
        body = over(local, (P(),), specs.of_workers(flags, axis_name), shardings)
        place = jax.jit(body, out_shardings=shardings)
        if not specs.is_explicit(mesh):
            return place(params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # unlike set_mesh also inside jit
            return place(params)

    def update_core(
        updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, Any]:
        like = params_like(updates, params)
        lift = lift_of(like if params is None else params)
        flags = flags_of(tx, axis_name, sizes, lift, like, state, example)
        traced, marks, fixed = split_extra(extra_args, n)
        step = local_step(tx, lift, axis_name)
        strip = lambda x, flag: x[0] if flag else x  # noqa: E731

        def local(g: Any, s: Any, p: Any, x: Any) -> Any:
            g = jax.tree.map(lambda leaf: leaf[0], g)
            x = jax.tree.map(strip, x, marks)
            emitted, after = step(g, jax.tree.map(strip, s, flags), p, {**x, **fixed})
            return emitted, jax.tree.map(lambda y, f: y[None] if f else y, after, flags)

        of_state = specs.of_workers(flags, axis_name)
        shardings = None
        if specs.is_explicit(mesh):
            full = specs.of_state(tx, like, axis_name, sizes, lift, flags, mesh)
            of_params = jax.tree_util.tree_map_with_path(
                lambda path, _: lift.specs.get(context.path_string(path), P()), like
            )
            shardings = specs.shardings((of_params, full), mesh)
        body = over(
            local,
            (P(axis_name), of_state, P(), specs.of_workers(marks, axis_name)),
            (P(), of_state),
            shardings,
        )
        return body(updates, state, params, traced)

    compiled = jax.jit(update_core)  # one for all eager calls; inside a user's jit it is inlined

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_gradients(updates, params, n, axis_name)
        run = compiled if all_arrays(extra_args) else update_core
        return run(updates, state, params, extra_args)

    def abstract_state(params: Any) -> Any:
        remember(params)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(init_fn, params),
            specs.shardings(specs_of(params)[1], mesh),
        )

    lifted = Lifted(init_fn, update_fn)
    lifted.axis_name, lifted.sizes = axis_name, sizes
    lifted.worker_axes = lambda params: infer(params, lift_of(params))
    lifted.state_specs = lambda params: specs_of(params)[1]
    lifted.abstract_state = abstract_state
    return lifted


def over_mesh(
    mesh: Mesh,
    axis_name: AxisName,
    fun: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    shardings: Any,
) -> Callable[..., Any]:
    """``fun`` as a map that is manual over the worker axis only, on Auto and Explicit meshes."""
    manual = set(axis_names(axis_name))
    if not specs.is_explicit(mesh):
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


def mesh_sizes(mesh: Mesh, axis_name: AxisName) -> inference.Sizes:
    """The number of workers along each axis; refuses names that the mesh does not have."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh={mesh!r} is not a mesh; make one with jax.make_mesh((n,), ('data',)), or use "
            "ef_optax.simulate to run n workers without devices."
        )
    check.axis(axis_name)
    names = axis_names(axis_name)
    missing = [a for a in names if a not in mesh.axis_names]
    if missing or not names:
        raise ValueError(
            f"axis_name={axis_name!r} must name axes of the mesh, which has {mesh.axis_names}."
        )
    return tuple(mesh.shape[a] for a in names)
