"""The lift: makes one worker's transformation accept the gradients of all workers.

``data_parallel`` (workers are devices of a mesh) and ``simulate`` (workers are a ``vmap`` axis)
have the same interface and follow the same trajectory:

    init(params)                    makes the state, with its shapes and devices
    update(grads, state, params)    grads have a leading worker axis and are not averaged

Leaves of the state that differ between workers get a leading worker axis; ``inference`` finds them.
All workers skip a step in which any worker has a NaN, an infinity, or a gradient with a norm above
1.8e19 (see ``quarantine``). Both functions are :func:`lifted` over a
:class:`~ef_optax.parallel.worker_map.WorkerMap`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import trees
from ef_optax._rules import resting
from ef_optax.parallel import inference
from ef_optax.parallel.arguments import (
    PRESENT,
    REMEDY,
    all_arrays,
    check_gradients,
    check_params,
    is_own,
    take_apart,
)
from ef_optax.parallel.participation import check_present, silenced, waiting
from ef_optax.parallel.quarantine import each_gradient, keep_if_bad, watched
from ef_optax.parallel.remedies import explained
from ef_optax.parallel.worker_map import SAME, Layout, WorkerMap


class Lifted(optax.GradientTransformationExtraArgs):
    """A lifted transformation: the Optax pair, and functions that describe its state.

    Attributes:
      axis_name: the worker axis.
      sizes: the number of workers along each axis.
      num_workers: the number of workers.
      worker_axes: ``worker_axes(params)`` is True for the state leaves with a worker axis.
      state_specs: ``state_specs(params)`` has the partition spec of each state leaf.
      abstract_state: ``abstract_state(params)`` has shapes, dtypes and (on a mesh) shardings.
    """

    axis_name: AxisName
    sizes: tuple[int, ...]
    num_workers: int
    worker_axes: Callable[[Any], Any]
    state_specs: Callable[[Any], Any]
    abstract_state: Callable[[Any], Any]


def lifted(
    tx: optax.GradientTransformation, workers: WorkerMap, extra_args: dict[str, Any] | None = None
) -> Lifted:
    """One worker's transformation on all workers of a map.

    Args:
      tx: a chain that exchanges over the axis of ``workers``.
      workers: the map, which runs a function of one worker on all workers.
      extra_args: examples of extra arguments that the update needs.

    Raises:
      TypeError: if ``tx`` is no transformation, or lifted already.
    """
    _check_transformation(tx)
    plans = _Plans(tx, workers, extra_args)
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> Any:
        check_params(params)
        workers.note(params)
        plan = plans.make(params)

        def local(params: Any) -> Any:
            with context.lifting(plan.lift):
                return resting.begun(tx.init, params)

        with explained():
            return workers.run(local, (params,), (SAME,), plan.layouts, plan.specs, place=True)

    def update_core(
        updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, Any]:
        like = _like(updates) if params is None else params
        plan = plans.make(like)
        plan.check(state, workers.num_workers, without_params=params is None)
        if PRESENT in extra_args:
            mask = check_present(extra_args[PRESENT], workers.num_workers)
            extra_args = {**extra_args, PRESENT: mask}
        extra = take_apart(extra_args, workers.num_workers, own=is_own, numbers=True)
        of_extra = [workers.own if own else SAME for own in extra.own]

        def local(g: Any, s: Any, p: Any, x: Any) -> tuple[Any, Any]:
            names = [name for name, value in extra_args.items() if is_own(name, value)]
            given = extra.rebuild(x)
            return resting.stepped(
                lambda s: _update_of_one(inner, plan, workers.axis_name, names, g, s, p, given), s
            )

        with explained():
            return workers.run(
                local,
                (updates, state, params, extra.arrays),
                (workers.own, plan.layouts, SAME, of_extra),
                (SAME, plan.layouts),
                (plan.of_params(like), plan.specs),
            )

    compiled = jax.jit(update_core)  # for all eager calls; inside a user's jit it is inlined

    def abstract_state(params: Any) -> Any:
        check_params(params)
        workers.note(params)
        return plans.make(params).abstract_state(workers)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_gradients(updates, params, workers.num_workers, workers.axis_name)
        run = compiled if all_arrays(extra_args) else update_core
        return run(updates, state, params, extra_args)

    pair = Lifted(init_fn, update_fn)
    pair.axis_name, pair.sizes = workers.axis_name, workers.sizes
    pair.num_workers = workers.num_workers
    pair.worker_axes = lambda params: jax.tree.map(
        lambda layout: layout.stacked, plans.make(params).layouts
    )
    pair.state_specs = lambda params: plans.make(params).specs
    pair.abstract_state = abstract_state
    return pair


def _update_of_one(
    inner: optax.GradientTransformationExtraArgs,
    plan: _Plan,
    axis: AxisName,
    own: list[str],
    g: Any,
    state: Any,
    params: Any,
    given: dict[str, Any],
) -> tuple[Any, Any]:
    """One worker's update; ``own`` are the extra arguments that differ between workers."""
    present = given.pop(PRESENT, None)
    own = [name for name in own if name != PRESENT]
    if present is not None:
        g = silenced(present, g)
        given |= {name: silenced(present, given[name]) for name in own}
    others = [x for name in own for x in each_gradient(name, given[name])]
    lift = dataclasses.replace(watched(plan.lift, g, *others, axis=axis), present=present)
    with context.lifting(lift):
        emitted, after = inner.update(g, state, params, **given)
    if present is not None:
        after = waiting(present, plan.layouts, after, state)
    unsplit = not lift.axis_sizes
    return keep_if_bad(emitted, after, state, axis, accepted=lift.accepted, local=unsplit)


def _check_transformation(tx: Any) -> None:
    """Refuses what cannot be lifted: no transformation, or one that is lifted already.

    Raises:
      TypeError: with the remedy.
    """
    if isinstance(tx, Lifted):
        raise TypeError(
            f"tx is already lifted, to {tx.num_workers} workers along axis_name={tx.axis_name!r}; "
            "lift the chain inside once, with data_parallel or with simulate."
        )
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"tx={tx!r} is not an Optax transformation, such as optax.chain("
            "ef_optax.error_feedback(compressor, axis_name='data'), optax.sgd(0.1))."
        )


def _like(updates: Any) -> Any:
    """Shapes and dtypes of the parameters, from gradients that have a leading worker axis."""
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), updates)


class _Plan(NamedTuple):
    """What the shapes of the parameters determine about the state of a chain."""

    lift: context.Lift  # the context of the exchanges
    local: Any  # shape and dtype of each leaf of one worker's state
    layouts: Any  # the layout of each leaf in the state of all workers
    specs: Any  # how each leaf is split over a mesh, worker axis first

    def of_params(self, params: Any) -> Any:
        """The spec of each parameter over the model axes."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.lift.specs.get(context.path_string(path), P()), params
        )

    def abstract_state(self, workers: WorkerMap) -> Any:
        """Shape, dtype and sharding of each leaf of the state of all workers."""

        def of_all(
            layout: Layout, x: jax.ShapeDtypeStruct, spec: P, host: bool
        ) -> jax.ShapeDtypeStruct:
            shape = _shape_of_all(layout, x, workers.num_workers)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=workers.sharding(spec, host))

        hosts = resting.kinds(self.local)
        return jax.tree.map(of_all, self.layouts, self.local, self.specs, hosts)

    def check(self, state: Any, num_workers: int, *, without_params: bool = False) -> None:
        """Refuses the state of another transformation, of an unlifted one, or of other workers.

        Raises:
          ValueError: for such a state; the message has the leaf and the remedy.
        """
        if jax.tree.structure(state) != jax.tree.structure(self.local):
            raise ValueError(
                "state has another tree structure than the state of this transformation: "
                f"{trees.difference(state, self.local)}. Make it with its own init, from these "
                "parameters."
            )
        located = jax.tree_util.tree_leaves_with_path(state)
        layouts = jax.tree.leaves(self.layouts)
        rows = list(zip(located, jax.tree.leaves(self.local), layouts, strict=True))
        one = all(jnp.shape(x) == like.shape for (_, x), like, _ in rows)
        if one and any(layout.stacked for layout in layouts):
            raise ValueError(
                "state has no worker axis anywhere: it was made by the chain inside; make it "
                "with the init of the lifted transformation."
            )
        for (path, x), like, layout in rows:
            shape, expected = jnp.shape(x), _shape_of_all(layout, like, num_workers)
            what = f"state{jax.tree_util.keystr(path)} has shape {shape}, expected {expected}: "
            if layout.stacked and len(shape) == len(expected) and shape[0] != num_workers:
                raise ValueError(
                    f"{what}it is the state of {shape[0]} workers, but there are {num_workers}. "
                    "Carry it over with "
                    "ef_optax.parallel.change_workers(state, tx.init(params)), which keeps the "
                    "mean of the residuals."
                )
            if shape != expected:
                local = f"grads have no leading worker axis ({REMEDY}), or "
                raise ValueError(
                    f"{what}{local if without_params else ''}it does not belong to this "
                    "transformation; make the state with its own init."
                )


def _shape_of_all(layout: Layout, x: jax.ShapeDtypeStruct, num_workers: int) -> tuple[int, ...]:
    return (num_workers, *x.shape) if layout.stacked else x.shape


class _Plans:
    """Makes plans; parameters of equal structure, shapes, dtypes and specs share one."""

    def __init__(
        self, tx: optax.GradientTransformation, workers: WorkerMap, extra_args: Any
    ) -> None:
        self.tx, self.workers, self.extra_args = tx, workers, extra_args
        self.known: dict[Any, _Plan] = {}

    def make(self, params: Any) -> _Plan:
        """The plan for these parameters, or for their shapes and dtypes."""
        lift = self.workers.surroundings(params)
        leaves, treedef = jax.tree.flatten(inference.abstract(params))
        looks = tuple((x.shape, x.dtype) for x in leaves)
        key = treedef, looks, tuple(lift.specs.items())
        if key not in self.known:
            self.known[key] = self._infer(params, lift)
        return self.known[key]

    def _infer(self, params: Any, lift: context.Lift) -> _Plan:
        tx, workers = self.tx, self.workers
        like = inference.abstract(params)
        with context.lifting(lift.virtual()):  # model axes are emulated, so no device is needed
            local, varying = inference.varying_axes(
                tx,
                like,
                workers.axis_name,
                workers.sizes,
                extra_args=self.extra_args,
                trace=workers.tracing,
            )
        layouts = jax.tree.map(Layout, varying)
        specs = workers.state_specs(tx, like, lift, local, layouts)
        return _Plan(lift, local, layouts, specs)


def state_specs(tx: Any, params: Any) -> Any:
    """Partition spec of every state leaf of a lifted transformation, worker axis first.

    Args:
      tx: what :func:`data_parallel` or :func:`simulate` returned.
      params: parameters, or their shapes and dtypes.

    Returns:
      A tree of ``PartitionSpec`` shaped like the state, for ``in_specs``, donation and restore.

    Raises:
      TypeError: if ``tx`` is not lifted.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(0.1), axis_name="w"), 4, "w")
      >>> tuple(ef.parallel.state_specs(tx, jnp.zeros(3)).residual)
      ('w',)
    """
    return _lifted(tx).state_specs(params)


def abstract_state(tx: Any, params: Any) -> Any:
    """Shape, dtype and (on a mesh) sharding of every state leaf, as the target of a restore.

    Args:
      tx: what :func:`data_parallel` or :func:`simulate` returned.
      params: parameters, or their shapes and dtypes.

    Returns:
      A tree of ``jax.ShapeDtypeStruct`` shaped like the state; nothing is allocated.

    Raises:
      TypeError: if ``tx`` is not lifted.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.error_feedback(ef.top_k(0.1), axis_name="w"), 4, "w")
      >>> ef.parallel.abstract_state(tx, jnp.zeros(3)).residual.shape
      (4, 3)
    """
    return _lifted(tx).abstract_state(params)


def _lifted(tx: Any) -> Lifted:
    if not isinstance(tx, Lifted):
        raise TypeError(
            f"tx={type(tx).__name__} is not lifted; pass what data_parallel or simulate returned "
            "(for a hand-written map use ef_optax.parallel.worker_axes)."
        )
    return tx
