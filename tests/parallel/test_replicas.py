"""Copies that should be equal: one bit in one copy is found and named, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ef_optax as ef


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((2, 2), ("data", "model"), (auto,) * 2, devices=jax.devices()[:4])


def copies(mesh: jax.sharding.Mesh, spec: PartitionSpec, bad: int | None) -> jax.Array:
    """Four values by four devices; those of one device have another last bit."""
    sharding = NamedSharding(mesh, spec)
    whole = np.arange(1, 5, dtype=np.float32)
    shards = []
    for i, (device, index) in enumerate(sharding.addressable_devices_indices_map((4,)).items()):
        part = whole[index]
        part = np.nextafter(part, np.float32(9)) if i == bad else part
        shards.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays((4,), sharding, shards)


@pytest.mark.parametrize("bad", [0, 3])
def test_one_bit_in_one_copy_is_named(mesh: jax.sharding.Mesh, bad: int) -> None:
    """Also where each part of an array has copies on two of four devices."""
    tree = {
        "good": copies(mesh, PartitionSpec(), None),
        "part": [copies(mesh, PartitionSpec("model"), bad), copies(mesh, PartitionSpec(), bad)],
        "number": 3.0,
    }
    assert ef.parallel.differing_replicas(tree) == ("part/0", "part/1")


def test_what_has_no_copies_or_equal_ones_is_passed(mesh: jax.sharding.Mesh) -> None:
    """Shards that differ are no copies; a NaN equals itself; keys have bits, too."""
    tree = {
        "shards": copies(mesh, PartitionSpec(("data", "model")), 1),
        "nan": jax.device_put(jnp.full(3, jnp.nan), NamedSharding(mesh, PartitionSpec())),
        "key": jax.device_put(jax.random.key(1), NamedSharding(mesh, PartitionSpec())),
        "host": np.ones(3),
    }
    assert ef.parallel.differing_replicas(tree) == ()
    assert ef.parallel.differing_replicas({}) == ()
