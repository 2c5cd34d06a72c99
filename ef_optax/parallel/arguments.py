"""Checks the parameters and gradients of all workers, and splits other arguments into arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import TRAINABLE_PART

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


# ---------------------------------------------------------------------------- parameters


def check_params(params: Any) -> None:
    """Refuses leaves that are not arrays, and trees from which ``optax.masked`` removed leaves."""
    if _masked(params):
        raise ValueError(
            "params contains optax.MaskedNode: optax.masked or optax.partition is around the "
            "lifted transformation, and the leaves that it leaves out would keep their worker "
            "axis. Put it inside: data_parallel(optax.masked(...), ...)."
        )
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not (is_array(x) or is_number(x)):
            name = f"params{jax.tree_util.keystr(path)}"
            raise TypeError(f"{name} is {_described(x)}, not an array; {TRAINABLE_PART}")


def check_trainable(params: Any) -> None:
    """Refuses parameters that have no gradient, naming the leaf.

    Raises:
      TypeError: for leaves that are not arrays, or not floating-point.
    """
    check_params(params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(x, "dtype", None)
        if not jnp.issubdtype(jnp.result_type(x) if dtype is None else dtype, jnp.inexact):
            name = f"params{jax.tree_util.keystr(path)}"
            raise TypeError(f"{name} has dtype {dtype}, so it has no gradient; {TRAINABLE_PART}")


def _described(x: Any) -> str:
    return f"the function {getattr(x, '__name__', x)!r}" if callable(x) else repr(x)


# ---------------------------------------------------------------------------- gradients


def check_gradients(updates: Any, params: Any, n: int, axis_name: AxisName) -> None:
    """Refuses gradients unless every leaf is (n, *parameter): one per worker, not averaged.

    Raises:
      ValueError: for another shape; the message has the leaf, its shape and the remedy.
    """
    check_params(updates)
    reference = updates if params is None else params
    if jax.tree.structure(updates) != jax.tree.structure(reference):
        raise ValueError(
            "grads have another tree structure than params: "
            f"{trees.difference(updates, reference)}. The order is tx.update(grads, state, params)."
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


# ---------------------------------------------------------------------------- other arguments

PRESENT = "present"
"""The extra argument that says which workers take part in a step; the lift keeps it to itself."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Named arguments, split into arrays, which go to the workers, and everything else.

    Whatever is not an array (a function, a string, True and False, the settings inside a model) is
    the same Python value on all workers.

    Attributes:
      arrays: the arrays.
      own: whether each array has a leading worker axis.
      rebuild: makes the arguments of one worker from that worker's arrays.
    """

    arrays: list[Any]
    own: list[bool]
    rebuild: Callable[[Sequence[Any]], dict[str, Any]]


def take_apart(
    named: Mapping[str, Any],
    n: int,
    *,
    own: Callable[[str, Any], bool] = lambda name, value: False,
    numbers: bool = False,
) -> Arguments:
    """Splits arguments into arrays and everything else.

    Args:
      named: arguments by name; those wrapped in :class:`PerWorker` differ between workers.
      n: the number of workers.
      own: of a name and its value, whether it differs between workers in any case.
      numbers: whether a Python number counts as an array. If so, it may change without a new
        trace; if not, it may decide what is traced.

    Raises:
      ValueError: if a per-worker leaf does not have n rows.
    """
    tree = {
        name: PerWorker(x) if own(name, x) and not _marked(x) else x for name, x in named.items()
    }
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_marked)
    for path, node in nodes:
        if _marked(node):
            check_rows(f"{path[0].key}{jax.tree_util.keystr(path[1:])}", node.value, n)
    marks = [_marked(node) for _, node in nodes for _ in jax.tree.leaves(node)]
    leaves, treedef = jax.tree.flatten(tree)
    moves = [is_array(x) or (numbers and is_number(x)) for x in leaves]

    def rebuild(arrays: Sequence[Any]) -> dict[str, Any]:
        rest = iter(arrays)
        filled = [next(rest) if moved else x for x, moved in zip(leaves, moves, strict=True)]
        return jax.tree.map(
            lambda x: x.value if _marked(x) else x, treedef.unflatten(filled), is_leaf=_marked
        )

    def of_arrays(items: list[Any]) -> list[Any]:
        return [x for x, moved in zip(items, moves, strict=True) if moved]

    return Arguments(of_arrays(leaves), of_arrays(marks), rebuild)


def is_own(name: str, value: Any) -> bool:
    """Whether an extra argument differs between workers, as gradients at query points do."""
    return _marked(value) or name in ("grads", PRESENT)


def all_arrays(extra: Mapping[str, Any]) -> bool:
    """Whether all extra arguments are arrays or numbers, so that they can go through ``jit``."""
    return all(is_array(x) or is_number(x) for x in jax.tree.leaves(dict(extra)))


def is_array(x: Any) -> bool:
    """Whether this is an array of JAX or NumPy, or the abstract value of one.

    >>> is_array(jnp.ones(2)), is_array(jax.ShapeDtypeStruct((), "float32")), is_array(1.0)
    (True, True, False)
    """
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_number(x: Any) -> bool:
    """Whether this is a Python number; True and False are not.

    >>> is_number(1.0), is_number(True), is_number(jnp.ones(()))
    (True, False, False)
    """
    return isinstance(x, int | float | complex) and not isinstance(x, bool)


def _marked(x: Any) -> bool:
    return isinstance(x, PerWorker)
