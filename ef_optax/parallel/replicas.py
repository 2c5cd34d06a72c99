"""Copies that should be equal: parameters on all workers, and what all of them remember alike.

Every worker applies the same update to its own copy, so copies that differ once differ for ever,
and the loss alone does not show it: faulty memory, an operation whose result depends on the device,
or another version of a library on one host.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ef_optax._core.context import path_string


def differing_replicas(tree: Any) -> tuple[str, ...]:
    """The leaves of which some copies differ in at least one bit.

    Devices that hold the same part of an array according to its sharding hold copies. Each copy is
    brought to the host and only checksums travel, in one small gather; with several processes all
    of them must call this together, and all get the same answer. It costs about a second for each
    GB of a process's devices, so call it now and then, not in every step.

    Args:
      tree: arrays with a sharding, such as the parameters or a state; other leaves are passed over.

    Returns:
      The paths of these leaves, in the order of the tree; empty if all copies are equal.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
      >>> everywhere = jax.NamedSharding(mesh, jax.P())
      >>> params = jax.device_put({"w": jnp.ones(3)}, everywhere)
      >>> ef.parallel.differing_replicas(params)
      ()
      >>> copies = [jax.device_put(jnp.full(3, i), d) for i, d in enumerate(mesh.devices)]
      >>> params["w"] = jax.make_array_from_single_device_arrays((3,), everywhere, copies)
      >>> ef.parallel.differing_replicas(params)
      ('w',)
    """
    paths, rows = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            for row in _parts(leaf):
                paths.append(path_string(path))
                rows.append(row)
    if not rows:
        return ()
    seen = np.array(rows, np.uint32)[None]
    if jax.process_count() > 1:
        seen = np.asarray(multihost_utils.process_allgather(seen[0]))
    sums, held, differ = np.moveaxis(seen, -1, 0)  # each of (processes, parts)
    low = np.where(held, sums, np.iinfo(np.uint32).max).min(0)
    high = np.where(held, sums, 0).max(0)
    wrong = differ.any(0) | (low < high)
    return tuple(dict.fromkeys(path for path, bad in zip(paths, wrong, strict=True) if bad))


def _parts(x: jax.Array) -> Iterator[tuple[int, int, int]]:
    """The parts into which the sharding cuts x, as this process sees them.

    Yields:
      The checksum of a part, whether a device of this process holds it, and whether those that do
      disagree.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    indices = x.sharding.devices_indices_map(x.shape).values()
    found: dict[str, set[int]] = {str(index): set() for index in indices}
    for shard in x.addressable_shards:
        found[str(shard.index)].add(zlib.crc32(np.ascontiguousarray(shard.data).tobytes()))
    for _, sums in sorted(found.items()):
        yield min(sums, default=0), bool(sums), len(sums) > 1
