"""Workers as devices of a mesh, whose axes may be Auto or Explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._numeric import check
from ef_optax._rules import resting
from ef_optax.parallel import specs
from ef_optax.parallel.lift import Lifted, lifted
from ef_optax.parallel.worker_map import Layout, Sizes, Tracing, WorkerMap, each


def data_parallel(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis_name: AxisName,
    param_specs: Any = None,
    *,
    extra_args: dict[str, Any] | None = None,
) -> Lifted:
    """Lifts one worker's transformation to a mesh: the workers are the devices along an axis.

    The lift is manual over the worker axis only, and model axes stay automatic. So transformations
    after the exchange keep their global meaning (``clip_by_global_norm`` uses the norm over all
    devices), and each device compresses only the slice of a parameter that it owns.

    Args:
      tx: a chain that exchanges over ``axis_name``.
      mesh: the device mesh; its axes may be Auto or Explicit.
      axis_name: the mesh axis (or tuple of axes) of the workers.
      param_specs: partition specs of the parameters over the other axes, a tree or prefix tree as
        for ``in_specs``. None reads them from the parameters' shardings in ``init``. Inside jit on
        an Auto mesh they cannot be read, so pass them if parameters are split.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A transformation with ``init(params)``, which places the state, and
      ``update(grads, state, params)``: each leaf of ``grads`` has a leading axis of n workers, not
      averaged (see :func:`worker_value_and_grad`). Extra arguments are replicated unless wrapped
      in :class:`PerWorker`; ``grads=`` (gradients at query points) is per worker. With
      ``present=mask``, n booleans, absent workers add nothing to the step and their memories wait.

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
    return lifted(tx, MeshMap(mesh, axis_name, param_specs), extra_args)


class MeshMap(WorkerMap):
    """A worker is a device along an axis of the mesh; the other axes stay automatic."""

    def __init__(self, mesh: Mesh, axis_name: AxisName, param_specs: Any = None) -> None:
        self.sizes = _sizes(mesh, axis_name)
        self.mesh, self.axis_name, self.param_specs = mesh, axis_name, param_specs
        self._noted: dict[Any, Any] = {}  # structure of params -> their specs

    def run(
        self,
        fun: Callable[..., Any],
        operands: tuple[Any, ...],
        layouts: tuple[Any, ...],
        results: Any,
        out_specs: Any,
        *,
        place: bool = False,
    ) -> Any:
        def local(*operands: Any) -> Any:
            own = each(lambda layout, x: x[0] if layout.stacked else x, layouts, operands)
            return each(lambda layout, x: x[None] if layout.stacked else x, results, fun(*own))

        manual = {
            "in_specs": jax.tree.map(self._spec, layouts),
            "out_specs": jax.tree.map(self._spec, results),
            "axis_names": set(axis_names(self.axis_name)),
            "check_vma": False,
        }
        if not _is_explicit(self.mesh) or (not place and self._fit(operands, layouts)):
            mapped = jax.shard_map(local, mesh=self.mesh, **manual)
            if place:
                mapped = jax.jit(mapped, out_shardings=self._shardings(out_specs))
            return mapped(*operands)

        def automatic(*operands: Any) -> Any:  # the mesh of the context, whose axes are Auto here
            return jax.shard_map(local, **manual)(*operands)

        return self._automatically(automatic, operands, self._shardings(out_specs))

    @property
    def tracing(self) -> Tracing:
        if self._model_axes:  # they are emulated, so the map of run is another one
            return super().tracing
        # All axes are manual inside the map, whatever they are outside.
        outside = dict.fromkeys(self.mesh.axis_names, jax.sharding.AxisType.Auto)
        mesh = self.mesh.abstract_mesh.update_axis_types(outside)

        def tracing(fun: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
            mapped = jax.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)

            def traced(*operands: Any) -> tuple[Any, Any]:
                with jax.sharding.use_abstract_mesh(mesh):
                    jaxpr, results = jax.make_jaxpr(mapped, return_shape=True)(*operands)
                return jaxpr, jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results
                )

            return traced

        return tracing

    def on_all(self, fun: Callable[[Any], Any], tree: Any) -> Any:
        if not _is_explicit(self.mesh):
            return fun(tree)
        return self._automatically(fun, (tree,), self.sharding(P()))

    def _fit(self, operands: tuple[Any, ...], layouts: tuple[Any, ...]) -> bool:
        """Whether a map over an Explicit mesh takes these operands as they are.

        All axes are then manual, and the type of each operand has the spec of its layout. Such a
        map needs no conversion to automatic axes, which costs two equations and two constraints for
        each result to trace and compile.
        """

        def fits(layout: Layout, x: Any) -> bool:
            found = jax.typeof(x).sharding
            if found.mesh != self.mesh.abstract_mesh:
                return False
            own = axis_names(self.axis_name) if layout.axes else ()
            return context.spec_axes(P(*found.spec[:1])) == own and not any(found.spec[1:])

        return not self._model_axes and all(jax.tree.leaves(each(fits, layouts, operands)))

    @property
    def _model_axes(self) -> dict[str, int]:
        """The sizes of the mesh's other axes."""
        names = axis_names(self.axis_name)
        return {axis: size for axis, size in self.mesh.shape.items() if axis not in names}

    def _automatically(self, fun: Callable[..., Any], operands: Any, shardings: Any) -> Any:
        """Runs ``fun`` on the Explicit mesh as if its axes were Auto."""
        mapped = jax.sharding.auto_axes(fun, out_sharding=shardings)
        # jit also accepts operands that are not on the mesh yet. Unlike set_mesh, this context can
        # be entered inside a jitted function.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(mapped, out_shardings=shardings)(*operands)

    def note(self, params: Any) -> None:
        if not specs.is_traced(params):
            self._noted[jax.tree.structure(params)] = specs.concrete(params, self.mesh)

    def surroundings(self, params: Any) -> context.Lift:
        given = self.param_specs
        if given is None:
            given = self._noted.get(jax.tree.structure(params))
        if given is None and _is_explicit(self.mesh):
            given = specs.typed(params)
        if given is None:
            given = specs.concrete(params, self.mesh)
        sizes = self._model_axes
        return context.Lift(specs.by_path(params, given, self.axis_name, sizes), sizes)

    def state_specs(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        lift: context.Lift,
        local: Any,
        layouts: Any,
    ) -> Any:
        split = specs.over_model_axes(
            tx, params, self.axis_name, self.sizes, lift, self.mesh, local
        )

        def full(layout: Layout, spec: P, like: jax.ShapeDtypeStruct) -> P:
            if not like.size:
                return P()  # XLA replicates empty arrays; otherwise the second step would recompile
            return P(self.axis_name, *spec) if layout.axes else spec

        return jax.tree.map(full, layouts, split, local)

    def sharding(self, spec: P, host: bool = False) -> NamedSharding:
        return NamedSharding(self.mesh, spec, memory_kind=resting.HOST if host else None)

    def _shardings(self, tree: Any) -> Any:
        hosts = resting.kinds(tree, specs.is_spec)
        return jax.tree.map(self.sharding, tree, hosts, is_leaf=specs.is_spec)

    def _spec(self, layout: Layout) -> P:
        """The spec over the worker axis alone."""
        return P(self.axis_name) if layout.axes else P()


def _is_explicit(mesh: Mesh) -> bool:
    """Whether some axis of the mesh is Explicit, so that types carry shardings."""
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def _sizes(mesh: Mesh, axis_name: AxisName) -> Sizes:
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
