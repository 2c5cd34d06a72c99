"""Workers without devices: the worker axis is a ``vmap`` axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax.parallel import specs
from ef_optax.parallel.lift import Lifted, lifted
from ef_optax.parallel.worker_map import Layout, Sizes, WorkerMap, each, sizes_of


def simulate(
    tx: optax.GradientTransformation,
    num_workers: int | tuple[int, ...],
    axis_name: AxisName,
    *,
    param_specs: Any = None,
    model_axes: Mapping[str, int] | None = None,
    extra_args: dict[str, Any] | None = None,
) -> Lifted:
    """Runs all workers in one process: the worker axis is a ``vmap`` axis and needs no devices.

    Args:
      tx: a chain that exchanges over ``axis_name``.
      num_workers: the number of workers (one number for each axis of a tuple).
      axis_name: the name that ``tx`` uses for the worker axis.
      param_specs: partition specs of the parameters over ``model_axes``, to follow the trajectory
        of a mesh on which they are split (compression is per slice there).
      model_axes: name and size of each model axis that ``param_specs`` names.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A transformation with ``init(params)`` and ``update(grads, state, params)``, where each leaf
      of ``grads`` has a leading axis of ``num_workers`` and is not averaged; it emits one update.
      With ``present=mask``, absent workers add nothing to the step and their memories wait.

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
    sizes = sizes_of(axis_name, num_workers)
    return lifted(tx, VmapMap(sizes, axis_name, param_specs, model_axes or {}), extra_args)


MANY_SHAPES = 8
"""The state for parameters of more shapes than this is made by one program."""


class VmapMap(WorkerMap):
    """A worker is an index of a ``vmap`` axis; model axes are emulated in the same way."""

    def __init__(
        self,
        sizes: Sizes,
        axis_name: AxisName,
        param_specs: Any = None,
        model_axes: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes, self.axis_name = sizes, axis_name
        self.param_specs, self.model_axes = param_specs, dict(model_axes or {})

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
        del out_specs  # there are no devices
        names = axis_names(self.axis_name)
        for name, size in reversed(list(zip(names, self.sizes, strict=True))):
            in_axes, out_axes = (
                jax.tree.map(lambda layout, a=name: 0 if a in layout.axes else None, tree)
                for tree in (layouts, results)
            )
            fun = jax.vmap(fun, in_axes, out_axes, axis_name=name, axis_size=size)

        def all_workers(*operands: Any) -> Any:
            return each(self._fold, results, fun(*each(self._unfold, layouts, operands)))

        shapes = {jnp.shape(x) for x in jax.tree.leaves(operands)}
        # Eagerly, every operation is a program of its own for each shape.
        together = place and len(shapes) > MANY_SHAPES
        return (jax.jit(all_workers) if together else all_workers)(*operands)

    def _unfold(self, layout: Layout, x: Any) -> Any:
        """Splits the worker axis into one dimension for each of the leaf's own axes."""
        if layout.divided:
            return jnp.reshape(x, (*self.sizes, -1, *jnp.shape(x)[1:]))
        if not layout.axes or len(self.sizes) == 1:
            return x
        own = tuple(slice(None) if a in layout.axes else 0 for a in axis_names(self.axis_name))
        return jnp.reshape(x, (*self.sizes, *jnp.shape(x)[1:]))[own]

    def _fold(self, layout: Layout, x: Any) -> Any:
        """The inverse of ``_unfold``; the leaf is repeated along the axes that are not its own."""
        if not layout.axes or len(self.sizes) == 1:
            return x
        names = axis_names(self.axis_name)
        missing = [i for i, name in enumerate(names) if name not in layout.axes]
        shape = x.shape[len(layout.axes) :]
        full = jnp.broadcast_to(jnp.expand_dims(x, missing), (*self.sizes, *shape))
        return full.reshape(self.num_workers, *shape)

    def on_all(self, fun: Callable[[Any], Any], tree: Any) -> Any:
        return fun(tree)

    def note(self, params: Any) -> None:
        del params

    def surroundings(self, params: Any) -> context.Lift:
        found = {}
        if self.param_specs is not None:
            found = specs.by_path(params, self.param_specs, self.axis_name, self.model_axes)
        return context.Lift(found, self.model_axes, simulated=True)

    def state_specs(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        lift: context.Lift,
        local: Any,
        layouts: Any,
    ) -> Any:
        del tx, params, lift, local
        return jax.tree.map(lambda layout: P(self.axis_name) if layout.axes else P(), layouts)

    def sharding(self, spec: P, host: bool = False) -> None:
        del spec, host
