"""Copies that should be equal: parameters on all workers, and what all of them remember alike.

Every worker applies the same update to its own copy, so copies that differ once differ for ever,
and the loss alone does not show it: faulty memory, an operation whose result depends on the device,
or another version of a library on one host.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    located = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
    ]
    paths = [path_string(path) for path, _ in located]
    parts = parts_of([leaf for _, leaf in located])
    return tuple(dict.fromkeys(paths[part.leaf] for part in parts if part.low < part.high))


class Part(NamedTuple):
    """A part into which a sharding cuts an array; devices that hold the same one have copies.

    Attributes:
      leaf: the number of the array.
      begin: of the part, along every axis.
      end: of the part, along every axis.
      low: the lowest CRC-32 of its copies.
      high: the highest; the same if all copies are equal.
    """

    leaf: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    low: int
    high: int


def parts_of(leaves: Sequence[Any]) -> list[Part]:
    """The parts of all arrays on all devices; with several processes all of them call this."""
    own = [part for number, leaf in enumerate(leaves) for part in _parts(number, leaf)]
    if not own:
        return []
    seen = np.array([[[part.low, part.high] for part in own]], np.int64)
    if jax.process_count() > 1:
        # Sums have 32 bits and arrays of 64 may be switched off, so they travel as bytes.
        seen = multihost_utils.process_allgather(seen[0].view(np.uint8))
        seen = np.ascontiguousarray(seen).view(np.int64)
    lows, highs = np.moveaxis(seen, -1, 0)  # each of (processes, parts); -1: no copy there
    low = np.where(lows < 0, np.iinfo(np.int64).max, lows).min(0)
    return [
        part._replace(low=int(a), high=int(b))
        for part, a, b in zip(own, low, highs.max(0), strict=True)
    ]


def checksum(array: Any) -> int:
    """CRC-32 of the bytes of an array on the host."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def local_parts(leaf: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """What this process holds of an array: where it begins and ends along every axis, and it."""
    if not isinstance(leaf, jax.Array):
        yield (0,) * np.ndim(leaf), np.shape(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        yield *_bounds(shard.index, leaf.shape), np.asarray(shard.data)


def _parts(number: int, leaf: Any) -> Iterator[Part]:
    """The parts of one array, with the checksums that this process sees; -1: it has no copy."""
    if not isinstance(leaf, jax.Array):
        yield Part(number, (0,) * np.ndim(leaf), np.shape(leaf), *[checksum(leaf)] * 2)
        return
    x = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    indices = x.sharding.devices_indices_map(x.shape).values()
    found: dict[Any, set[int]] = {_bounds(index, x.shape): set() for index in indices}
    for begin, end, data in local_parts(x):
        found[begin, end].add(checksum(data))
    for (begin, end), sums in sorted(found.items()):
        yield Part(number, begin, end, min(sums, default=-1), max(sums, default=-1))


def _bounds(
    index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the slices of an array begin and end."""
    pairs = [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
