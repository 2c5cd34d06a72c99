"""The only file that calls a collective of ``jax.lax``.

Every function works under ``jax.shard_map`` (checked or not), ``jax.pmap`` and ``jax.vmap`` with an
axis name, and with ``axis=None`` (one worker, no communication). Results that are equal on all
workers have that type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AxisName = str | tuple[str, ...] | None


class UnboundAxisError(NameError):
    """A rule names an axis over which no surrounding map runs.

    Attributes:
      axis: what the rule names.
    """

    def __init__(self, axis: AxisName, message: str) -> None:
        super().__init__(message)
        self.axis = axis


def axis_names(axis: AxisName) -> tuple[str, ...]:
    """The axis name as a tuple; empty for None."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def by_device(axis: AxisName) -> bool:
    """Whether the axis is one of devices (``shard_map``, ``pmap``) and not one of ``vmap``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return all(name in manual for name in axis_names(axis))


def varies(x: Any, axis: AxisName) -> bool:
    """Whether the type of ``x`` says that it differs along the axis (checked ``shard_map``)."""
    varying = jax.typeof(x).manual_axis_type.varying
    return any(name in varying for name in axis_names(axis))


def typed(axis: AxisName) -> bool:
    """Whether values have types that vary over the axis, that is, ``shard_map`` checks them."""
    return axis is not None and varies(jax.lax.axis_index(axis), axis)


def axis_size(axis: AxisName) -> int:
    """Number of workers along the axis, a Python int.

    Raises:
      NameError: if no surrounding map binds the axis; the message has the remedy.
    """
    if axis is None:
        return 1
    try:
        return int(jax.lax.axis_size(axis))
    except NameError as error:
        raise UnboundAxisError(
            axis,
            f"axis_name={axis!r} is not the name of an axis here. Lift the chain with "
            "ef_optax.data_parallel(tx, mesh, axis_name) or ef_optax.simulate(tx, n, axis_name), "
            "of that name, or call its update inside jax.shard_map; axis_name=None is one worker.",
        ) from error


def bound_size(axis: AxisName) -> int:
    """:func:`axis_size`, or 1 outside of the map that binds the axis, where states may be made."""
    try:
        return axis_size(axis)
    except NameError:
        return 1


def axis_index(axis: AxisName) -> jax.Array | int:
    """This worker's index along the axis."""
    return 0 if axis is None else jax.lax.axis_index(axis)


def all_gather(x: jax.Array, axis: AxisName) -> jax.Array:
    """Every worker's ``x`` with a leading worker axis; equal on all workers."""
    if axis is None:
        return x[None]
    if by_device(axis):
        return jax.lax.all_gather(x, axis, to="invarying")
    gathered = x
    for name in reversed(axis_names(axis)):  # under vmap one call may name only one axis
        gathered = jax.lax.all_gather(gathered, name, to="varying")
    return gathered.reshape(axis_size(axis), *x.shape)


def one_by_one(axis: AxisName) -> bool:
    """Whether a merged all-reduce takes its arrays one after the other, each with its own latency.

    XLA does so between processes on CPUs. Arrays that are split over other axes of the mesh count
    as merged in any case, because joining them would gather them.
    """
    if axis is None or jax.process_count() == 1 or jax.default_backend() != "cpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return by_device(axis) and set(mesh.axis_names) == set(mesh.manual_axes)


def psum(x: Any, axis: AxisName) -> Any:
    """The sum over the workers of each array of a tree."""
    if axis is None:
        return x
    arrays, structure = jax.tree.flatten(x)
    on_cpu = not by_device(axis) and jax.default_backend() == "cpu"
    loops = [on_cpu and a.size >= LARGE and a.dtype.itemsize >= 4 for a in arrays]
    others = [a for a, loop in zip(arrays, loops, strict=True) if not loop]
    rest = iter(jax.lax.psum(to_varying(others, axis), axis) if others else ())
    sums = [
        _in_order(all_gather(a, axis)) if loop else next(rest)
        for a, loop in zip(arrays, loops, strict=True)
    ]
    return jax.tree.unflatten(structure, sums)


LARGE = 1 << 15
"""Arrays of so many entries are summed by a loop over the workers that a CPU simulates."""


@jax.jit
def _in_order(rows: jax.Array) -> jax.Array:
    """The sum of the rows, one after the other, as the devices of a CPU add them up.

    XLA's own sum over the first axis takes up to 70 times as long in JAX 0.10. Narrow numbers are
    left to it, as it adds them in float32; so are small ones, as a loop takes longer to compile.
    """
    return jax.lax.fori_loop(1, len(rows), lambda i, total: total + rows[i], rows[0])


def pmax(x: Any, axis: AxisName) -> Any:
    """The elementwise maximum over the workers of each array of a tree."""
    return x if axis is None else jax.lax.pmax(to_varying(x, axis), axis)


def all_to_all(x: jax.Array, axis: AxisName) -> jax.Array:
    """Row ``j`` of ``x`` goes to worker ``j``; row ``i`` of the result came from worker ``i``."""
    if axis is None:
        return x
    return jax.lax.all_to_all(to_varying(x, axis), axis, 0, 0)


def permute(x: jax.Array, pairs: Sequence[tuple[int, int]], axis: AxisName) -> jax.Array:
    """The ``x`` of the worker that has this one as its target; zeros if no worker has."""
    if axis is None:
        return jnp.zeros_like(x)
    if by_device(axis):
        return jax.lax.ppermute(to_varying(x, axis), axis, list(pairs))
    source = np.full(axis_size(axis), -1)  # under vmap every worker must send, along one axis
    for start, target in pairs:
        source[target] = start
    own = jnp.asarray(source)[axis_index(axis)]
    return jnp.where(own >= 0, all_gather(x, axis)[own], jnp.zeros_like(x))


def anywhere(flag: jax.Array, axis: AxisName) -> jax.Array:
    """Whether the boolean scalar is True on any device of the surrounding ``shard_map``.

    The other axes of the mesh count too: devices that take different branches with a ``ppermute``
    wait for each other, even if no message passes between them.
    """
    if axis is None:
        return flag
    manual = jax.sharding.get_abstract_mesh().manual_axes if by_device(axis) else axis_names(axis)
    return pmax(flag.astype(jnp.int32), tuple(manual)) > 0


def to_varying(tree: Any, axis: AxisName) -> Any:
    """Arrays that are the same on all workers, with the types of ones that differ.

    No data moves. Asking whether types vary costs an equation, so it is asked once for all arrays.
    """

    def missing(x: Any) -> tuple[str, ...]:
        varying = jax.typeof(x).manual_axis_type.varying
        return tuple(name for name in axis_names(axis) if name not in varying)

    def one(x: Any) -> Any:
        names = missing(x)
        return jax.lax.pcast(x, names, to="varying") if names else x

    needed = any(missing(x) for x in jax.tree.leaves(tree)) and typed(axis)
    return jax.tree.map(one, tree) if needed else tree


def agreed_cond(pred: Any, true_fun: Any, false_fun: Any, *operands: Any, axis: AxisName) -> Any:
    """``lax.cond`` for branches with collectives; the predicate must be the same on all workers.

    If the predicate of a collective differs between workers, they wait for each other for ever. JAX
    accepts such a program, so it is refused here.

    Raises:
      ValueError: if the type of ``pred`` varies over the axis.
    """
    _require_agreed("pred", pred, axis)
    return jax.lax.cond(pred, true_fun, false_fun, *operands)


def agreed_switch(
    index: Any, branches: Sequence[Callable[..., Any]], *operands: Any, axis: AxisName
) -> Any:
    """``lax.switch`` for branches with collectives; the index must be the same on all workers.

    Raises:
      ValueError: if the type of ``index`` varies over the axis.
    """
    _require_agreed("index", index, axis)
    return jax.lax.switch(index, branches, *operands)


def _require_agreed(name: str, value: Any, axis: AxisName) -> None:
    if axis is not None and varies(jnp.asarray(value), axis):
        raise ValueError(
            f"{name} differs between the workers of axis {axis!r}, so the collectives under it "
            "would wait for ever; reduce it first (a step count, or a psum/pmax of the local flag)."
        )


def require_local(tree: Any, axis: AxisName) -> None:
    """Refuses gradients that are already summed over the workers.

    Under a checked ``jax.shard_map``, the gradient with respect to replicated parameters is already
    the sum over the axis, and equal on all workers. Compressing it would save nothing, and its mean
    would be too large by a factor n. The types show it.

    Raises:
      ValueError: for such a leaf; the message has its name and the remedy.
    """
    if axis is None:
        return
    axis_size(axis)  # raises if the axis is not bound
    if not typed(axis):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not varies(leaf, axis):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} is the same on all workers of axis {axis!r}: "
                "it is already reduced (under jax.shard_map, jax.grad with respect to replicated "
                "parameters returns the sum over the workers), so there is nothing left to "
                "compress. Take the gradient of local parameters: "
                f"jax.grad(loss)(jax.lax.pcast(params, {axis!r}, to='varying'), batch), use "
                "ef_optax.worker_value_and_grad, or pass check_vma=False to jax.shard_map."
            )
