"""Which leaves of a chain's state differ between workers: asked, not declared.

"Does this leaf vary over the workers?" is the question "is it batched under ``vmap`` over the
worker axis?", and JAX's batching rules answer it for any transformation. One update is traced
abstractly; a ``custom_vmap`` identity at its end sees which leaves are batched; the answer is fed
back as input until nothing changes. No device is needed, and the answer is the same for a
simulation and for a mesh. It is stricter than types where that matters: a ``lax.cond`` on a local
predicate becomes a select, so a collective under it is seen to vary, where a mesh would hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ef_optax._core import context
from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._numeric import check
from ef_optax.estimators.points import query_points

Sizes = tuple[int, ...]


def sizes_of(
    axis: AxisName, num_workers: int | tuple[int, ...], option: str = "num_workers"
) -> Sizes:
    """The number of workers along each axis.

    Raises:
      ValueError: if ``num_workers`` does not give one positive integer for each axis.
    """
    check.axis(axis)
    names = axis_names(axis)
    given = num_workers if isinstance(num_workers, tuple | list) else (num_workers,)
    whole = [s for s in given if isinstance(s, int | np.integer) and not isinstance(s, bool)]
    sizes = tuple(s for s in whole if s >= 1)
    if not names or len(given) != len(names) or len(sizes) != len(names):
        raise ValueError(
            f"{option}={num_workers!r} must give one positive integer for each axis of "
            f"axis_name={axis!r}."
        )
    return tuple(int(s) for s in sizes)


def bind_axes(
    fun: Callable[..., Any], axis: AxisName, sizes: Sizes, in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """``vmap`` over every axis of ``axis``; mapped arguments have one leading dimension each."""
    for name, size in reversed(list(zip(axis_names(axis), sizes, strict=True))):
        fun = jax.vmap(fun, in_axes, out_axes, axis_name=name, axis_size=size)
    return fun


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a tree, without its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def local_state(tx: optax.GradientTransformation, params: Any, axis: AxisName, sizes: Sizes) -> Any:
    """Shapes and dtypes of one worker's state, as ``tx.init`` makes it inside the map."""
    bound = bind_axes(lambda _, p: tx.init(p), axis, sizes, (0, None), 0)
    whole = jax.eval_shape(bound, jax.ShapeDtypeStruct(sizes, jnp.int32), params)
    skip = len(sizes)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[skip:], x.dtype), whole)


def worker_axes(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    num_workers: int | tuple[int, ...],
    *,
    extra_args: dict[str, Any] | None = None,
) -> Any:
    """Finds which leaves of the state of ``tx`` differ between workers.

    For those who write their own ``shard_map``: leaves marked True need a leading worker axis and
    ``PartitionSpec(axis_name, ...)``, the others stay replicated.

    Args:
      tx: a transformation (usually a chain) that exchanges over ``axis_name``.
      params: parameters, or their shapes and dtypes.
      axis_name: the worker axis, or a tuple of axes.
      num_workers: the size of the axis, or of each axis.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A tree of bools shaped like the state.

    Raises:
      ValueError: if nothing in the chain exchanges, or if updates come out that differ between the
        workers (a leaf that no exchange saw), naming the leaf.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.trace(0.9), ef.error_feedback(ef.top_k(k=1), axis_name="data"),
      ...                  optax.trace(0.5))
      >>> before, feedback, after = ef.parallel.worker_axes(tx, jnp.zeros(4), "data", 8)
      >>> before.trace, feedback.residual, after.trace
      (True, True, False)
    """
    sizes = sizes_of(axis_name, num_workers)
    varying = varying_axes(tx, params, axis_name, sizes, extra_args=extra_args)
    return jax.tree.map(bool, varying)


def varying_axes(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: Sizes,
    *,
    extra_args: dict[str, Any] | None = None,
) -> Any:
    """For each leaf of the state the set of worker axes over which it differs (a frozenset).

    With a tuple of axes and one exchange over each, the first residual differs over all of them,
    the second only over those that the first exchange has not reached. See :func:`worker_axes`.
    """
    params = abstract(params)
    state = local_state(tx, params, axis_name, sizes)
    _require_exchange(state)
    extra = {} if extra_args is None else abstract(extra_args)
    update = optax.with_extra_args_support(tx).update
    every = frozenset(axis_names(axis_name))
    nowhere: frozenset[str] = frozenset()

    def begin(_: Any, p: Any) -> Any:
        return tx.init(p)

    def step(g: Any, s: Any, p: Any, x: Any) -> Any:
        points = query_points(s, p)
        if len(points) > 1 and "grads" not in x:  # gradients at query points vary like g
            x = {**x, "grads": dict.fromkeys(points, g)}
        return update(g, s, p, **x)

    own = _varying_results(begin, (every, nowhere), (0, params), axis_name, sizes)
    while True:
        marks, arguments = (every, own, nowhere, nowhere), (params, state, params, extra)
        moved, after = _varying_results(step, marks, arguments, axis_name, sizes)
        merged = jax.tree.map(lambda a, b: a | b, own, after)
        if jax.tree.leaves(merged) == jax.tree.leaves(own):
            break
        own = merged
    for path, differs in jax.tree_util.tree_leaves_with_path(moved):
        if differs:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} differs between the workers of axis "
                f"{axis_name!r} after the chain: no exchange saw it, or a collective stands under "
                "a condition that differs between workers. Do not put optax.masked, "
                "optax.apply_if_finite or optax.conditionally_transform around an exchange; to "
                "send a leaf dense use ef_optax.per_leaf(policy)."
            )
    return own


def _require_exchange(state: Any) -> None:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ExchangeState))
    if not any(isinstance(x, ExchangeState) for x in nodes):
        raise ValueError(
            "nothing in this chain exchanges anything between the workers, so every worker would "
            "follow its own gradient; add ef_optax.error_feedback(compressor, axis_name=...) or "
            "ef_optax.compressed_mean(compressor, axis_name=...)."
        )


def _varying_results(
    fun: Callable[..., Any], marks: tuple[Any, ...], arguments: Any, axis: AxisName, sizes: Sizes
) -> Any:
    """For each leaf of ``fun(*arguments)`` the axes over which it varies, given the arguments'.

    One axis at a time is asked: it is mapped outermost, and the tap stands between it and the maps
    over the others.
    """
    marks = tuple(
        jax.tree.map(lambda _, m=mark: m, argument) if isinstance(mark, frozenset) else mark
        for argument, mark in zip(arguments, marks, strict=True)
    )
    names = axis_names(axis)
    size_of = dict(zip(names, sizes, strict=True))
    result: Any = None
    for name in names:
        order = (name, *(other for other in names if other != name))

        def led(x: Any, own: frozenset[str], order: tuple[str, ...] = order) -> Any:
            lead = [size_of[a] for a in order if a in own]
            return jax.ShapeDtypeStruct((*lead, *jnp.shape(x)), jnp.result_type(x))

        whole = jax.tree.map(led, arguments, marks)
        inner = map_axes(fun, order[1:], size_of, marks, 0)
        seen = _batched_results(inner, marks, whole, name, size_of[name])
        found = jax.tree.map(lambda flag, a=name: frozenset((a,)) if flag else frozenset(), seen)
        result = found if result is None else jax.tree.map(lambda a, b: a | b, result, found)
    return result


def map_axes(
    fun: Callable[..., Any], names: tuple[str, ...], size_of: Any, marks: Any, out_axes: Any
) -> Callable[..., Any]:
    """``vmap`` over the named axes, the first outermost; each leaf is mapped over its own axes.

    ``marks`` gives the set of axes of every leaf of the arguments, which has one leading dimension
    for each, in the order of ``names``. ``out_axes`` is 0 or a function of the axis name.
    """
    for name in reversed(names):
        in_axes = jax.tree.map(lambda own, a=name: 0 if a in own else None, marks)
        out = out_axes(name) if callable(out_axes) else out_axes
        fun = jax.vmap(fun, in_axes, out, axis_name=name, axis_size=size_of[name])
    return fun


def _batched_results(
    fun: Callable[..., Any], marks: Any, arguments: Any, name: str, size: int
) -> Any:
    """Which leaves of ``fun(*arguments)`` are batched under ``vmap`` over the axis ``name``."""
    seen: list[Any] = []

    @jax.custom_batching.custom_vmap
    def tap(tree: Any) -> Any:
        return tree

    @tap.def_vmap
    def _(size: int, batched: Any, tree: Any) -> Any:
        del size
        seen.append(batched[0])
        return tree, batched[0]

    def one(*args: Any) -> int:
        tree = fun(*args)
        seen.append(jax.tree.map(lambda _: False, tree))  # where nothing is batched
        tap(tree)
        return 0

    jax.eval_shape(map_axes(one, (name,), {name: size}, marks, None), *arguments)
    return jax.tree.map(lambda *flags: any(flags), *seen)


def leading_flags(local: Any, state: Any) -> Any:
    """Which leaves of a lifted state have the leading worker axis: one dimension more than local.

    Raises:
      ValueError: if the ranks fit neither, i.e. the state belongs to another transformation.
    """

    def flag(one: Any, x: Any) -> bool:
        extra = x.ndim - len(one.shape)
        if extra not in (0, 1):
            raise ValueError(
                f"state: a leaf of shape {x.shape} does not belong to this transformation, which "
                f"has {one.shape} there; make the state with its own init."
            )
        return bool(extra)

    return jax.tree.map(flag, local, state)


def path_specs(params: Any, specs: Any) -> dict[str, jax.sharding.PartitionSpec]:
    """Leaf path -> spec, from a tree (or prefix tree) of partition specs."""
    if not jax.tree.leaves(params):  # such as the placeholder of optax.tree.map_params
        return {}
    is_spec = lambda x: x is None or isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    spread = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec or jax.sharding.PartitionSpec(), part),
        specs,
        params,
        is_leaf=is_spec,
    )
    located = jax.tree_util.tree_leaves_with_path(spread, is_leaf=is_spec)
    return {context.path_string(path): spec for path, spec in located}


def worker_count(sizes: Sizes) -> int:
    """The number of workers over all axes."""
    return math.prod(sizes)
