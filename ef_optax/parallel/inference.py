"""Which leaves of a chain's state differ between workers: inferred, not declared.

One update is traced abstractly. The equations of the trace show which leaves of the new state
differ, given which gradients and which leaves of the old state differ (see ``dataflow``); the
answer is fed back until nothing changes. No device is needed, and the answer is the same for a
simulation and for a mesh. It is stricter than types in one important case: the results of a
``lax.cond`` on a local predicate differ, so a collective under it, at which a mesh would hang, is
found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._exchange.collectives import AxisName, axis_names
from ef_optax._exchange.exchange import ExchangeState
from ef_optax.estimators.points import query_points
from ef_optax.parallel.arguments import PerWorker, take_apart
from ef_optax.parallel.dataflow import NOWHERE, Axes, Dataflow, axes_inside
from ef_optax.parallel.remedies import workers_along
from ef_optax.parallel.worker_map import Sizes, Tracing, sizes_of, without_devices


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a tree, without its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def worker_axes(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    num_workers: int | tuple[int, ...],
    *,
    extra_args: dict[str, Any] | None = None,
) -> Any:
    """Finds which leaves of the state of ``tx`` differ between workers.

    It is for those who write their own ``shard_map``: leaves marked True need a leading worker axis
    and ``PartitionSpec(axis_name, ...)``; the others stay replicated.

    Args:
      tx: a transformation (usually a chain) that exchanges over ``axis_name``.
      params: parameters, or their shapes and dtypes.
      axis_name: the worker axis, or a tuple of axes.
      num_workers: the size of the axis, or of each axis.
      extra_args: examples of extra arguments that the update needs (``{"value": 0.0}``).

    Returns:
      A tree of bools shaped like the state.

    Raises:
      ValueError: if nothing in the chain exchanges, or if an update differs between the workers
        (for a leaf that no exchange has handled); the message has the leaf.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.trace(0.9), ef.error_feedback(ef.top_k(k=1), axis_name="data"),
      ...                  optax.trace(0.5))
      >>> before, feedback, after = ef.parallel.worker_axes(tx, jnp.zeros(4), "data", 8)
      >>> before.trace, feedback.residual, after.trace
      (True, True, False)
    """
    sizes = sizes_of(axis_name, num_workers)
    _, varying = varying_axes(tx, params, axis_name, sizes, extra_args=extra_args)
    return jax.tree.map(bool, varying)


def varying_axes(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    sizes: Sizes,
    *,
    extra_args: dict[str, Any] | None = None,
    trace: Tracing | None = None,
) -> tuple[Any, Any]:
    """One worker's state (shapes and dtypes), and the set of axes over which each leaf differs.

    With a tuple of axes and one exchange over each, the first residual differs over all of them,
    and the second only over the axes that the first exchange does not cover. ``trace`` traces
    one worker's functions; by default no devices are needed. See :func:`worker_axes`.
    """
    params = abstract(params)
    trace = without_devices(axis_name, sizes) if trace is None else trace
    with workers_along(axis_name):
        begin, state = trace(tx.init)(params)
    _require_exchange(state)
    given, n = dict(extra_args or {}), math.prod(sizes)
    if "grads" in given:  # the example is of one worker; each has its own
        row = lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype)  # noqa: E731
        given["grads"] = PerWorker(jax.tree.map(row, abstract(given["grads"])))
    extra = take_apart(given, n, numbers=True)
    rows = abstract(extra.arrays)
    examples = [
        jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if own else x
        for x, own in zip(rows, extra.own, strict=True)
    ]
    update = optax.with_extra_args_support(tx).update

    def step(g: Any, s: Any, p: Any, arrays: Any) -> Any:
        x = extra.rebuild(arrays)
        points = query_points(s, p)
        if len(points) > 1 and "grads" not in x:  # gradients at query points vary like g
            x = {**x, "grads": dict.fromkeys(points, g)}
        return update(g, s, p, **x)

    with _about_the_update(), workers_along(axis_name):
        traced, results = trace(step)(params, state, params, examples)
    every = frozenset(axis_names(axis_name))
    moved, own = _to_the_fixpoint(begin, traced, every, len(jax.tree.leaves(params)), extra.own)
    for path, differs in zip(_paths(results[0]), moved, strict=True):
        if differs:
            raise ValueError(_no_exchange(f"updates{path}", differs, traced.jaxpr))
    return state, jax.tree.unflatten(jax.tree.structure(state), own)


def _no_exchange(name: str, differs: Axes, jaxpr: Any) -> str:
    """Why an update differs between workers, and what to do."""
    axes = ", ".join(repr(axis) for axis in sorted(differs))
    what = f"{name} differs between the workers of axis {axes} after the chain: "
    if not differs & axes_inside(jaxpr):
        return (
            f"{what}nothing in the chain exchanges over that axis. Name it in the rule, "
            f"ef_optax.error_feedback(compressor, axis_name={axes}). A compressor that is in "
            "the chain by itself sends nothing; put it into a rule."
        )
    return (
        f"{what}no exchange has handled it, or a collective is under a condition that differs "
        "between workers. What decides by a worker's own gradient cannot be around a rule "
        "(optax.masked, apply_if_finite, conditionally_transform, MultiSteps that skips steps, "
        "contrib.mechanize, contrib.sam). Put it after the rule: optax.chain(rule, "
        "optax.contrib.mechanize(optax.sgd(0.1))). Steps that are not finite are skipped without "
        "it. To send a leaf dense use ef_optax.per_leaf(policy); to freeze leaves, "
        "optax.partition({'train': optax.chain(rule, ...), 'freeze': optax.set_to_zero()}, labels)."
    )


@contextlib.contextmanager
def _about_the_update() -> Iterator[None]:
    """Adds to errors how the update of a chain can be traced before it has arguments."""
    try:
        yield
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            error.add_note(_ALONE)
            raise
        raise TypeError(
            f"the update of the chain needs an extra argument ({error}). Give an example of it "
            "to the lift, extra_args={'value': 0.0}, and pass its value in every step, "
            "update(grads, state, params, value=value)."
        ) from error
    except ValueError as error:
        error.add_note(_ALONE)
        raise


_ALONE = (
    "ef_optax: this happened when one update of the whole chain was traced, with gradients shaped "
    "like the parameters. Transformations with parameters or arguments of their own (lookahead, "
    "line searches) work around or after a rule that is lifted alone: "
    "optax.lookahead(optax.chain(ef_optax.data_parallel(rule, mesh, axis_name), ...), ...)."
)


def _to_the_fixpoint(
    begin: Any, step: Any, every: Axes, leaves: int, extra: Sequence[bool]
) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
    """The axes along which updates and state differ in any step.

    ``begin`` and ``step`` are traces of the chain's init and of one update with as many gradients
    as there are ``leaves`` of parameters; ``extra`` says which extra arguments differ.
    """
    same = (NOWHERE,) * leaves
    given = tuple(every if differs else NOWHERE for differs in extra)
    flow = Dataflow()
    own = flow.results(begin, same)
    while True:
        results = flow.results(step, (*(every,) * leaves, *own, *same, *given))
        moved, after = results[:leaves], results[leaves:]
        merged = tuple(a | b for a, b in zip(own, after, strict=True))
        if merged == own:
            return moved, own
        own = merged


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _require_exchange(state: Any) -> None:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ExchangeState))
    if not any(isinstance(x, ExchangeState) for x in nodes):
        raise ValueError(
            "nothing in this chain exchanges anything between the workers, so every worker would "
            "follow its own gradient; add ef_optax.error_feedback(compressor, axis_name=...) or "
            "ef_optax.compressed_mean(compressor, axis_name=...)."
        )
