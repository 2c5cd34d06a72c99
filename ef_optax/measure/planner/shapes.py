"""The leaves of a model, from its parameters or from their number alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.context import path_string


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Leaves of one shape.

    Attributes:
      path: the path of one of them, for policies by leaf.
      shape: their shape.
      times: how many there are.
    """

    path: str
    shape: tuple[int, ...]
    times: int = 1

    @property
    def size(self) -> int:
        """Values of all of them together."""
        return self.times * math.prod(self.shape)


def leaves_of(params: Any) -> tuple[Leaf, ...]:
    """The leaves of a model.

    Args:
      params: a tree of arrays or of their shapes, or a number of parameters. A number stands for a
        decoder-only transformer of that size, to the parameter: layers of four matrices d x d and
        two of d x 4d with d/128 layers, and an embedding of width d with the rest.

    Raises:
      ValueError: if it has no parameters.

    Example:
      >>> [(leaf.path, leaf.shape, leaf.times) for leaf in leaves_of(7e9)][:2]
      [('attention', (4224, 4224), 128), ('up', (4224, 16896), 32)]
      >>> sum(leaf.size for leaf in leaves_of(7e9))
      7000000000
    """
    if isinstance(params, int | float) and not isinstance(params, bool):
        return _transformer(params)
    found: Counter[tuple[int, ...]] = Counter()
    paths: dict[tuple[int, ...], str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shape = tuple(jnp.shape(leaf))
        found[shape] += 1
        paths.setdefault(shape, path_string(path))
    leaves = tuple(Leaf(paths[shape], shape, times) for shape, times in found.items())
    if not sum(leaf.size for leaf in leaves):
        raise ValueError("params has no parameters; give a tree of arrays, or their number: 7e9.")
    return leaves


def _transformer(params: float) -> tuple[Leaf, ...]:
    if not (math.isfinite(params) and params >= 1 and params == int(params)):
        raise ValueError(
            f"params={params!r} is not a number of parameters; give an integer of at least 1, such "
            "as 7e9, or a tree of arrays."
        )
    count = int(params)
    width = max(64, 64 * round((128 * count / 12) ** (1 / 3) / 64))
    layers = min(max(1, width // 128), count // (12 * width**2))
    rest = count - 12 * width**2 * layers
    leaves = [
        Leaf("attention", (width, width), 4 * layers),
        Leaf("up", (width, 4 * width), layers),
        Leaf("down", (4 * width, width), layers),
        Leaf("embedding", (rest // width, width)),
        Leaf("bias", (rest % width,)),
    ]
    return tuple(leaf for leaf in leaves if leaf.size)
