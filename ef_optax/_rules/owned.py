"""Trees of which every worker owns one shard of each leaf, and the others own the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core import context
from ef_optax._exchange import collectives as coll
from ef_optax._exchange import slices
from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric.shards import is_real, joined, shards_of


def shards(tree: Any, axis_name: AxisName) -> Any:
    """This worker's shard of each leaf, as (shard,); the last worker's is padded with zeros.

    Outside of the map over the workers there is one worker, whose shard is the flattened leaf.

    Example:
      >>> shards({"w": jnp.ones((2, 3))}, None)["w"].shape
      (6,)
    """
    n = coll.bound_size(axis_name)
    index = 0 if n == 1 else coll.axis_index(axis_name)

    def one(x: Any) -> Any:
        rows = shards_of(jnp.asarray(x), n)
        return jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)

    return jax.tree.map(one, tree)


def without_padding(owned: Any, tree: Any, axis_name: AxisName) -> Any:
    """Shards of leaves like those of ``tree``, with zeros where there is only padding."""
    n, index = coll.axis_size(axis_name), coll.axis_index(axis_name)
    return jax.tree.map(lambda s, x: jnp.where(is_real(x.shape, index, n), s, 0), owned, tree)


def whole(gathered: Any, tree: Any) -> Any:
    """Leaves like those of ``tree`` from all workers' shards, which lie one after the other."""
    return jax.tree.map(lambda s, x: joined(s, x.shape), gathered, tree)


def require_unsplit(rule: str, tree: Any) -> None:
    """Refuses leaves that are split over model axes, of which a shard would be gathered first.

    Raises:
      ValueError: for such a leaf; the message has its path and the remedy.
    """
    paths = [context.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for path, spec in zip(paths, slices.leaf_specs(paths) or [], strict=False):
        if context.spec_axes(spec):
            raise ValueError(
                f"{rule}: params['{path}'] is split over model axes, {spec}, but its shards are "
                "spread over the worker axis. Replicate it over the other axes, or leave the model "
                "split as it is and use a rule such as error_feedback (HSDP), whose memories and "
                "optimizer are split like the parameters."
            )
