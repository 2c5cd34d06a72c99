"""Which compressor each leaf gets, if bits or errors of all leaves together are limited.

It is decided on the host, from one measurement on example gradients, and gives a
:func:`ef_optax.per_leaf` compressor. Decide again every few epochs; the program is compiled again
then, and the memories of the rule are kept, because they are like the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core import context
from ef_optax._core.policy import for_leaf
from ef_optax.compressors.combine.per_leaf import per_leaf
from ef_optax.compressors.compressor import Compressor, codec_of


def measured(
    gradients: Any, compressors: Sequence[Compressor]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """What every compressor makes of every leaf.

    Args:
      gradients: a tree of example inputs of one worker, such as a gradient plus its residual.
      compressors: the candidates.

    Returns:
      The leaves' paths; squared errors ``||C(x) - x||^2`` and message bits as (leaves, candidates)
      of float64; and the squared norms of the leaves.
    """
    located = jax.tree_util.tree_leaves_with_path(gradients)
    paths = [context.path_string(path) for path, _ in located]
    leaves = [x for _, x in located]
    errors, bits = [], []
    for compressor in compressors:
        codec = codec_of(compressor)
        sent, _ = jax.jit(compressor.update)(gradients, compressor.init(gradients))
        pairs = zip(leaves, jax.tree.leaves(sent), strict=True)
        errors.append([_squared(np.asarray(x, np.float64) - np.asarray(c)) for x, c in pairs])
        likes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        own = [for_leaf(codec, path, x) for path, x in zip(paths, likes, strict=True)]
        bits.append([one.bits(x.shape, x.dtype) for one, x in zip(own, likes, strict=True)])
    norms = np.asarray([_squared(np.asarray(x, np.float64)) for x in leaves])
    return paths, np.asarray(errors, float).T, np.asarray(bits, float).T, norms


def _squared(x: np.ndarray) -> float:
    return float((x * x).sum())


def cheapest(cost: np.ndarray, use: np.ndarray, limit: float, parts: int = 4096) -> list[int]:
    """The choice of least total cost whose total use is within a limit, by dynamic programming.

    Args:
      cost: (leaves, candidates), not negative.
      use: (leaves, candidates), not negative.
      limit: of the sum of ``use`` over the leaves.
      parts: into how many parts the limit is divided; uses are rounded up to whole parts, so that
        the limit holds.

    Returns:
      One candidate for each leaf, or an empty list if none is within the limit.

    >>> cheapest(np.array([[4.0, 1.0], [9.0, 1.0]]), np.array([[0.0, 2.0], [0.0, 2.0]]), 3.0)
    [0, 1]
    """
    if not limit > 0:
        units = np.where(use > 0, math.inf, 0.0)
    else:
        units = np.ceil(use * (parts / limit) * (1 - 1e-12))
    best = np.full(parts + 1, math.inf)
    best[0] = 0.0
    chosen = []
    for row_cost, row_units in zip(cost, units, strict=True):
        options = np.full((len(row_cost), parts + 1), math.inf)
        for i, (c, u) in enumerate(zip(row_cost, row_units, strict=True)):
            if u <= parts:
                options[i, int(u) :] = best[: parts + 1 - int(u)] + c
        chosen.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best).any():
        return []
    at, picks = int(best.argmin()), []
    for row, row_units in zip(reversed(chosen), reversed(units), strict=True):
        picks.append(int(row[at]))
        at -= int(row_units[picks[-1]])
    return picks[::-1]


def assigned(
    paths: Sequence[str], compressors: Sequence[Compressor], picks: Sequence[int]
) -> Compressor:
    """The chosen compressor of each leaf."""
    own = {path: compressors[pick] for path, pick in zip(paths, picks, strict=True)}
    return per_leaf(lambda path, _: own[path])
