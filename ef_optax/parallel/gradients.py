"""One gradient for every worker, with which a training step begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ef_optax._exchange import collectives as coll
from ef_optax._numeric import check
from ef_optax._numeric.random import is_key
from ef_optax.estimators.points import HessianVector, Points
from ef_optax.parallel import mesh_types, modules, specs
from ef_optax.parallel.arguments import (
    Arguments,
    check_rows,
    check_trainable,
    is_array,
    is_number,
    take_apart,
)
from ef_optax.parallel.closures import used_by
from ef_optax.parallel.mesh import MeshMap
from ef_optax.parallel.remedies import explained, workers_along
from ef_optax.parallel.simulation import VmapMap
from ef_optax.parallel.worker_map import SAME, WorkerMap, sizes_of


def worker_value_and_grad(
    loss_fn: Callable[..., Any],
    mesh_or_num_workers: Mesh | int | tuple[int, ...],
    axis_name: coll.AxisName,
    has_aux: bool = False,
    *,
    aux_mean: bool = False,
    accumulate: int = 1,
) -> Callable[..., Any]:
    """Every worker's loss and gradient on its share of the batch, not averaged.

    Args:
      loss_fn: ``loss_fn(params, batch, *args, **kwargs) -> loss`` (or ``(loss, aux)``) of one
        worker; the loss is a mean over its examples.
      mesh_or_num_workers: the mesh, or the number of workers to simulate without devices.
      axis_name: the worker axis (or tuple of axes); inside ``loss_fn`` collectives may use it.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      aux_mean: average the floating-point leaves of ``aux`` over the workers (BatchNorm
        statistics) and drop their worker axis; other leaves are then taken from worker 0.
      accumulate: split each worker's share into this many parts and average their gradients, so
        that several micro-batches share one exchange.

    Returns:
      ``fun(params, batch, *args, **kwargs)`` returning ``(losses, grads)`` or
      ``((losses, aux), grads)``, each with a leading worker axis n. Every leaf of ``batch`` has a
      leading axis divisible by n. Of the other arguments, random keys (``jax.random.key``) are
      folded with the worker's index, :class:`PerWorker` trees are split along their leading axis,
      other arrays are replicated, and anything that is not an array (``train=True``, a number, a
      string, a function) is a Python value inside ``loss_fn``. Pass all arrays as arguments: on a
      mesh with Explicit axes ``loss_fn`` may not close over arrays of the mesh, and a key that is
      not an argument is the same on all workers. If ``params`` comes from :func:`query_points`,
      ``grads`` is a dictionary with the gradient at each point, all on the same batch and keys.

      ``params`` may be a module of ``flax.nnx``, as for ``nnx.value_and_grad``: the gradients are
      those of its ``nnx.Param``, and its random keys are folded with the worker's index. Its other
      state is written back into it; floating-point values are averaged over the workers.

    Raises:
      ValueError: if the batch is not divisible by n (times ``accumulate``), or ``accumulate`` < 1.
      TypeError: if a leaf of ``params`` has no gradient, the loss is not a scalar, or a key is not
        typed (``jax.random.PRNGKey``).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> loss_fn = lambda w, x: jnp.mean((w - x) ** 2)
      >>> losses, grads = ef.worker_value_and_grad(loss_fn, 2, "data")(0.0, jnp.array([1.0, 3.0]))
      >>> losses.tolist(), grads.tolist()
      ([1.0, 9.0], [-2.0, -6.0])
    """
    check.axis(axis_name)
    check.flag("worker_value_and_grad", "has_aux", has_aux)
    check.flag("worker_value_and_grad", "aux_mean", aux_mean)
    check.count("worker_value_and_grad", "accumulate", accumulate)
    workers = _map_over(mesh_or_num_workers, axis_name)
    n = workers.num_workers

    def fun(params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        _check_modules(params, args, kwargs)
        if modules.is_module(params):
            return of_module(params, batch, *args, **kwargs)
        _check_batch(batch, n, accumulate)
        points = params if isinstance(params, Points) else Points({"params": params})
        check_trainable(points["params"])
        own_points = _own_axes(points, n)
        given = take_apart({"args": args, "kwargs": kwargs}, n)
        _check_keys(loss_fn, given)
        of_points = {name: workers.own if own else SAME for name, own in own_points.items()}
        of_arrays = [workers.own if own else SAME for own in given.own]
        first = 1 if points.own_params else 0  # a worker's own model is split over the workers
        of_grads = jax.tree.map(lambda p: P(axis_name, *specs.of(p)[first:]), points["params"])
        with explained(), workers_along(axis_name):
            (losses, aux), grads = workers.run(
                mesh_types.removed_if_needed(
                    _local_gradients(loss_fn, given, axis_name, has_aux, accumulate)
                ),
                (dict(points), batch, given.arrays),
                (of_points, workers.share, of_arrays),
                workers.own,
                (P(axis_name), dict.fromkeys(points, of_grads)),
            )
        if not isinstance(params, Points):
            grads = grads["params"]
        if not has_aux:
            return losses, grads
        return (losses, workers.on_all(_mean_aux, aux) if aux_mean else aux), grads

    def of_module(module: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        structure, params, rest = modules.split(module)
        loss = modules.of_parts(loss_fn, structure, has_aux)
        pure = worker_value_and_grad(
            loss, mesh_or_num_workers, axis_name, True, accumulate=accumulate
        )
        (losses, (aux, after)), grads = pure(params, batch, rest, *args, **kwargs)
        if accumulate > 1:
            after = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after)
        modules.write_back(module, rest, workers.on_all(_mean_aux, after))
        if not has_aux:
            return losses, grads
        return (losses, workers.on_all(_mean_aux, aux) if aux_mean else aux), grads

    return fun


def _map_over(
    mesh_or_num_workers: Mesh | int | tuple[int, ...], axis_name: coll.AxisName
) -> WorkerMap:
    if isinstance(mesh_or_num_workers, Mesh):
        return MeshMap(mesh_or_num_workers, axis_name)
    sizes = sizes_of(axis_name, mesh_or_num_workers, "mesh_or_num_workers")
    return VmapMap(sizes, axis_name)


def _check_modules(params: Any, args: Any, kwargs: Any) -> None:
    """Refuses modules in arguments where their changes to themselves would be lost.

    Raises:
      TypeError: with the remedy.
    """
    points = dict(params) if isinstance(params, Points) else {}
    nodes = jax.tree.leaves((points, args, kwargs), is_leaf=modules.is_module)
    if any(modules.is_module(x) for x in nodes):
        raise TypeError(
            "a flax.nnx module can only be the first argument; elsewhere its changes to itself "
            "would be lost. Pass its parts, structure, state = nnx.split(module), and put it "
            "together inside the loss, nnx.merge(structure, state); query points are those of "
            "nnx.state(model, nnx.Param)."
        )


def _check_batch(batch: Any, n: int, accumulate: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        rows = jnp.shape(x)[:1]
        if not rows or rows[0] % (n * accumulate):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}; its leading axis "
                f"must be divisible by {n} workers x accumulate={accumulate}. Drop or pad the rest."
            )


def _own_axes(points: Points, n: int) -> dict[str, Any]:
    """Which points differ between workers; their leaves have one dimension more than params."""
    params = jax.tree.leaves(points["params"])
    without = 1 if points.own_params else 0

    def own(point: Any) -> bool:
        target = point.point if isinstance(point, HessianVector) else point
        leaves = jax.tree.leaves(target)
        pairs = zip(leaves, params, strict=True)
        more = {jnp.ndim(x) - jnp.ndim(p) + without for x, p in pairs}
        if more - {0, 1} or len(more) > 1:
            raise ValueError("a query point must look like params, or have one worker axis more.")
        return more == {1}

    differ = {name: own(point) for name, point in points.items()}
    for name, point in points.items():
        if differ[name]:
            check_rows(f"the query point {name!r}", point, n)
    return differ


def _mean_aux(aux: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0], aux
    )


def _local_gradients(
    loss_fn: Callable[..., Any],
    given: Arguments,
    axis_name: coll.AxisName,
    has_aux: bool,
    accumulate: int,
) -> Callable[..., Any]:
    """``local(points, batch, arrays)`` of one worker: ((loss, aux), gradients at every point)."""

    def at_points(points: dict[str, Any], batch: Any, arrays: list[Any]) -> Any:
        def with_aux(params: Any) -> Any:
            rest = given.rebuild(arrays)  # inside the trace, so that nnx variables may be changed
            return _loss_and_aux(loss_fn(params, batch, *rest["args"], **rest["kwargs"]), has_aux)

        value, gradient = jax.value_and_grad(with_aux, has_aux=True)(points["params"])
        grads = {"params": gradient}
        gradient_at = lambda p: jax.grad(with_aux, has_aux=True)(p)[0]  # noqa: E731
        for name, point in points.items():
            if isinstance(point, HessianVector):
                grads[name] = jax.jvp(gradient_at, (point.point,), (point.tangent,))[1]
            elif name != "params":
                grads[name] = gradient_at(point)
        return value, grads

    def local(points: dict[str, Any], batch: Any, arrays: list[Any]) -> Any:
        arrays = _fold_keys(arrays, coll.axis_index(axis_name))
        if accumulate == 1:
            return at_points(points, batch, arrays)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def body(carry: Any, part: Any) -> Any:
            (loss, aux), grads = at_points(points, part[1], _fold_keys(arrays, part[0]))
            return jax.tree.map(jnp.add, carry, (loss, grads)), aux

        shapes = jax.eval_shape(at_points, points, jax.tree.map(lambda x: x[0], parts), arrays)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][0], shapes[1]))
        total, aux = jax.lax.scan(body, zeros, (jnp.arange(accumulate), parts))
        loss, grads = jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)
        return (loss, aux), grads

    return local


def _loss_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a loss returned, as ``(loss, aux)``.

    Raises:
      TypeError: unless the loss is a scalar, with an aux where ``has_aux`` says so.
    """
    pair = isinstance(result, tuple | list) and len(result) == 2
    if has_aux and not pair:
        raise TypeError(
            f"loss_fn returned {_described(result)}, but has_aux=True expects a pair, (loss, aux)."
        )
    loss: Any
    loss, aux = result if has_aux else (result, ())
    if pair and not has_aux:
        raise TypeError(
            "loss_fn returned a pair; if it is (loss, aux), write "
            "worker_value_and_grad(loss_fn, mesh, axis_name, has_aux=True); if it is (loss, "
            "gradient), pass the loss itself and not jax.value_and_grad of it."
        )
    if not (is_array(loss) or is_number(loss)) or jnp.shape(loss) != ():
        raise TypeError(
            f"loss_fn returned {_described(loss)} as the loss, which must be a scalar: the mean "
            "over the examples of one worker, jnp.mean(loss)."
        )
    return loss, aux


def _described(x: Any) -> str:
    return f"an array of shape {jnp.shape(x)}" if is_array(x) else f"a {type(x).__name__}"


# ---------------------------------------------------------------------------- random keys


def _fold_keys(arrays: list[Any], index: Any) -> list[Any]:
    return [jax.random.fold_in(x, index) if is_key(x) else x for x in arrays]


def _is_raw_key(x: Any) -> bool:
    """Whether this looks like ``jax.random.PRNGKey(0)``; it may be other numbers."""
    if getattr(x, "dtype", None) != jnp.uint32 or jnp.ndim(x) != 1:
        return False
    return x.shape == jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def _check_keys(loss_fn: Callable[..., Any], given: Arguments) -> None:
    """Refuses keys that would be the same on all workers.

    A loss that uses a key which is not an argument only gets a warning, because drawing the same
    numbers on all workers may be intended.

    Raises:
      TypeError: for an untyped key among the arguments.
    """
    for x, own in zip(given.arrays, given.own, strict=True):
        if _is_raw_key(x) and not own:
            raise TypeError(
                f"an argument of loss_fn is a uint32 array of shape {x.shape}, which looks like "
                "jax.random.PRNGKey(seed) and would be the same on all workers. Make it "
                "jax.random.key(seed), or jax.random.wrap_key_data(key): keys of that type are "
                "folded with the worker's index. Numbers that are not a key can be int32."
            )
    if any(is_key(x) or _is_raw_key(x) for x in used_by(loss_fn)):
        warnings.warn(
            "loss_fn uses a random key that is not an argument, so all workers draw the same "
            "numbers. Pass it, "
            "worker_value_and_grad(loss_fn, mesh, axis_name)(params, batch, key): a key among the "
            "arguments is folded with the worker's index.",
            stacklevel=3,
        )
