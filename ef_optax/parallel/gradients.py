"""One gradient for every worker, with which a training step begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ef_optax._exchange import collectives as coll
from ef_optax._numeric import check
from ef_optax.estimators.points import HessianVector, Points
from ef_optax.parallel import specs
from ef_optax.parallel.arguments import PerWorker, check_rows
from ef_optax.parallel.mesh import MeshMap
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
      loss_fn: ``loss_fn(params, batch, *args) -> loss`` (or ``(loss, aux)``) of one worker; the
        loss is a mean over its examples.
      mesh_or_num_workers: the mesh, or the number of workers to simulate without devices.
      axis_name: the worker axis (or tuple of axes); inside ``loss_fn`` collectives may use it.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      aux_mean: average the floating-point leaves of ``aux`` over the workers (BatchNorm
        statistics) and drop their worker axis; other leaves are then taken from worker 0.
      accumulate: split each worker's share into this many parts and average their gradients, so
        that several micro-batches share one exchange.

    Returns:
      ``fun(params, batch, *args)``, which returns ``(losses, grads)`` or
      ``((losses, aux), grads)``, each with a leading worker axis n. Every leaf of ``batch`` must
      have a leading axis divisible by n.
      Typed random keys in ``args`` (``jax.random.key``; a raw ``uint32`` key is an array like any
      other) are folded with the worker's index, :class:`PerWorker` trees are split along their
      leading axis, and everything else is replicated. If ``params`` comes from
      :func:`query_points`, ``grads`` is a dictionary with the gradient at each point, all on the
      same batch and keys.

    Raises:
      ValueError: if the batch is not divisible by n (times ``accumulate``), or ``accumulate`` < 1.

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
    local = _local_gradients(loss_fn, axis_name, has_aux, accumulate)
    workers = _map_over(mesh_or_num_workers, axis_name)
    n = workers.num_workers

    def fun(params: Any, batch: Any, *args: Any) -> Any:
        _check_batch(batch, n, accumulate)
        points = params if isinstance(params, Points) else Points({"params": params})
        own_points = _own_axes(points, n)
        for i, a in enumerate(args):
            if isinstance(a, PerWorker):
                check_rows(f"args[{i}]", a.value, n)
        of_args = tuple(workers.own if isinstance(a, PerWorker) else SAME for a in args)
        values = tuple(a.value if isinstance(a, PerWorker) else a for a in args)
        of_points = {name: workers.own if own else SAME for name, own in own_points.items()}
        of_grads = jax.tree.map(lambda p: P(axis_name, *specs.of(p)), points["params"])
        (losses, aux), grads = workers.run(
            local,
            (dict(points), batch, values),
            (of_points, workers.share, of_args),
            workers.own,
            (P(axis_name), dict.fromkeys(points, of_grads)),
        )
        if not isinstance(params, Points):
            grads = grads["params"]
        if not has_aux:
            return losses, grads
        return (losses, _mean_aux(aux) if aux_mean else aux), grads

    return fun


def _map_over(
    mesh_or_num_workers: Mesh | int | tuple[int, ...], axis_name: coll.AxisName
) -> WorkerMap:
    if isinstance(mesh_or_num_workers, Mesh):
        return MeshMap(mesh_or_num_workers, axis_name)
    sizes = sizes_of(axis_name, mesh_or_num_workers, "mesh_or_num_workers")
    return VmapMap(sizes, axis_name)


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

    def own(point: Any) -> bool:
        target = point.point if isinstance(point, HessianVector) else point
        leaves = jax.tree.leaves(target)
        more = {jnp.ndim(x) - jnp.ndim(p) for x, p in zip(leaves, params, strict=True)}
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
    loss_fn: Callable[..., Any], axis_name: coll.AxisName, has_aux: bool, accumulate: int
) -> Callable[..., Any]:
    """The function ``local(points, batch, args)`` of one worker.

    It returns ((loss, aux), gradients at every point).
    """

    def with_aux(params: Any, batch: Any, *args: Any) -> Any:
        return loss_fn(params, batch, *args) if has_aux else (loss_fn(params, batch, *args), ())

    def at_points(points: dict[str, Any], batch: Any, args: tuple[Any, ...]) -> Any:
        value_and_grad = jax.value_and_grad(with_aux, has_aux=True)
        value, gradient = value_and_grad(points["params"], batch, *args)
        grads = {"params": gradient}
        gradient_at = lambda p: jax.grad(with_aux, has_aux=True)(p, batch, *args)[0]  # noqa: E731
        for name, point in points.items():
            if isinstance(point, HessianVector):
                grads[name] = jax.jvp(gradient_at, (point.point,), (point.tangent,))[1]
            elif name != "params":
                grads[name] = gradient_at(point)
        return value, grads

    def local(points: dict[str, Any], batch: Any, args: tuple[Any, ...]) -> Any:
        index = coll.axis_index(axis_name)
        args = tuple(_fold_keys(a, index) for a in args)
        if accumulate == 1:
            return at_points(points, batch, args)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def body(carry: Any, part: Any) -> Any:
            (loss, aux), grads = at_points(points, part[1], _fold_parts(args, part[0]))
            return jax.tree.map(jnp.add, carry, (loss, grads)), aux

        shapes = jax.eval_shape(at_points, points, jax.tree.map(lambda x: x[0], parts), args)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][0], shapes[1]))
        total, aux = jax.lax.scan(body, zeros, (jnp.arange(accumulate), parts))
        loss, grads = jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)
        return (loss, aux), grads

    return local


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fold_keys(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.fold_in(x, index) if _is_key(x) else x, tree)


def _fold_parts(args: tuple[Any, ...], part: Any) -> tuple[Any, ...]:
    return tuple(_fold_keys(a, part) for a in args)
