"""The arguments of a lifted transformation: every worker's gradients, and extra arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._exchange.collectives import AxisName

REMEDY = "ef_optax.worker_value_and_grad(loss_fn, mesh, axis_name) makes gradients of this form"


@jax.tree_util.register_pytree_node_class
class PerWorker:
    """Marks an extra argument whose leaves have a leading worker axis; all others are replicated.

    Args:
      value: a tree of arrays with a leading axis of n workers.

    Example:
      >>> import jax.numpy as jnp
      >>> PerWorker(jnp.zeros((8, 3))).value.shape
      (8, 3)
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any]) -> PerWorker:
        del aux
        return cls(*children)


def _masked(tree: Any) -> bool:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(x, optax.MaskedNode) for x in nodes)


def check_params(params: Any) -> None:
    """Refuses parameters that ``optax.masked`` or ``optax.partition`` has already thinned out."""
    if _masked(params):
        raise ValueError(
            "params contains optax.MaskedNode: optax.masked or optax.partition is around the "
            "lifted transformation, and the leaves that it leaves out would keep their worker "
            "axis. Put it inside: data_parallel(optax.masked(...), ...)."
        )


def check_gradients(updates: Any, params: Any, n: int, axis_name: AxisName) -> None:
    """Refuses gradients unless every leaf is (n, *parameter): one per worker, not averaged.

    Raises:
      ValueError: for another shape; the message has the leaf, its shape and the remedy.
    """
    check_params(updates)
    reference = updates if params is None else params
    if jax.tree.structure(updates) != jax.tree.structure(reference):
        raise ValueError(
            f"grads have another tree structure than params: {jax.tree.structure(updates)} against "
            f"{jax.tree.structure(reference)}."
        )
    located = jax.tree_util.tree_leaves_with_path(updates)
    for (path, g), p in zip(located, jax.tree.leaves(reference), strict=True):
        expected = (n, *jnp.shape(p)) if params is not None else (n, *g.shape[1:])
        if g.shape != expected:
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} has shape {g.shape}, expected {expected}: one "
                f"gradient for each of the {n} workers of axis {axis_name!r} along a leading axis, "
                f"not averaged. {REMEDY}."
            )


def check_rows(name: str, tree: Any, n: int) -> None:
    """Refuses a per-worker tree unless every leaf has n rows, one for each worker.

    Raises:
      ValueError: for another number of rows; the message has the leaf and its shape.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(x)[:1] != (n,):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, expected "
                f"({n}, ...): a leading axis with a row for each of the {n} workers."
            )


def split_extra(extra: Mapping[str, Any], n: int) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Sorts extra arguments into (arrays, which of their leaves are per worker, all others).

    ``grads`` (gradients at query points) is per worker, like the gradients themselves.

    Raises:
      ValueError: if a per-worker leaf does not have n rows.
    """
    traced: dict[str, Any] = {}
    marks: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for name, value in extra.items():
        own = isinstance(value, PerWorker) or name == "grads"
        value = value.value if isinstance(value, PerWorker) else value
        leaves = jax.tree.leaves(value)
        if not leaves or not all(_array_like(x) for x in leaves):
            fixed[name] = value
            continue
        if own:
            check_rows(name, value, n)
        traced[name] = value
        marks[name] = jax.tree.map(lambda _, own=own: own, value)
    return traced, marks, fixed


def all_arrays(extra: Mapping[str, Any]) -> bool:
    """Whether all extra arguments are arrays, so that they can go through ``jit``."""
    return all(_array_like(x) for x in jax.tree.leaves(dict(extra)))


def _array_like(x: Any) -> bool:
    try:
        jnp.result_type(x)
    except TypeError:
        return False
    return True
