"""Arithmetic on trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype


def wide(tree: Any) -> Any:
    """The tree in float32 or wider, the dtype of a rule's arithmetic."""
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)


def widest(tree: Any) -> Any:
    """The dtype of its widest leaf, float32 at the least: that of numbers which apply to all.

    >>> widest({"a": jnp.zeros(2, jnp.bfloat16)}), widest([])
    (dtype('float32'), dtype('float32'))
    """
    dtypes = [wide_dtype(jnp.result_type(x)) for x in jax.tree.leaves(tree)]
    return max(dtypes, key=bits_of, default=jnp.dtype(jnp.float32))


def add(a: Any, b: Any) -> Any:
    """``a + b``, in the dtype of a."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def sub(a: Any, b: Any) -> Any:
    """``a - b``, in the dtype of a."""
    return jax.tree.map(lambda x, y: x - y.astype(x.dtype), a, b)


def scale(factor: Any, a: Any) -> Any:
    """``factor * a`` for a Python number or a scalar array, in the dtype of a."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, a)


def axpy(factor: Any, a: Any, b: Any) -> Any:
    """``factor * a + b``, in the dtype of b."""
    return add(b, scale(factor, a))


def copy(a: Any) -> Any:
    """The same numbers in new buffers, so that the caller may donate the old ones."""
    return jax.tree.map(jnp.array, a)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` if the scalar condition holds, else ``b``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y.astype(x.dtype)), a, b)


def squared_norm(a: Any) -> Array:
    """The sum of squares over all leaves."""
    return optax.tree.norm(a, squared=True)


def map_several(function: Callable[..., tuple[Any, ...]], tree: Any, *rest: Any) -> tuple[Any, ...]:
    """The trees of a function's first results, second results, and so on.

    >>> map_several(lambda x, y: (x + y, x - y), {"a": 5}, {"a": 2})
    ({'a': 7}, {'a': 3})
    """
    leaves, treedef = jax.tree.flatten(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    results = [function(*args) for args in zip(leaves, *others, strict=True)]
    return tuple(treedef.unflatten(one) for one in zip(*results, strict=True))


def difference(a: Any, b: Any) -> str:
    """Where the structures of two trees differ: the first leaf that only one of them has.

    Args:
      a: the tree that was given.
      b: the tree that it should be like.

    Example:
      >>> difference({"w": 1, "v": 2}, {"w": 1})
      "['v'] is there, but not expected"
      >>> difference([1, 2], (1, 2))
      'the leaves are the same, but list is there and tuple is expected'
    """
    names, others = (
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (a, b)
    )
    extra = [name for name in names if name not in set(others)][:1]
    missing = [name for name in others if name not in set(names)][:1]
    parts = [f"{name or 'one array'} is there, but not expected" for name in extra]
    parts += [f"{name or 'one array'} is expected, but not there" for name in missing]
    if parts:
        return "; ".join(parts)
    return "the leaves are the same, but {} is there and {} is expected".format(*_containers(a, b))


def _containers(a: Any, b: Any) -> tuple[str, str]:
    """The types of the outermost containers that differ."""
    if type(a) is type(b):
        parts = [jax.tree.leaves(x, is_leaf=lambda y, x=x: y is not x) for x in (a, b)]
        for x, y in zip(*parts, strict=False):
            if jax.tree.structure(x) != jax.tree.structure(y):
                return _containers(x, y)
    return type(a).__name__, type(b).__name__


def emit(aggregate: Any, updates: Any) -> Any:
    """The aggregate in the dtypes of the updates that the rule received."""
    return jax.tree.map(lambda c, g: c.astype(g.dtype), aggregate, updates)
