"""Fixtures and profiles shared by all tests; the environment is set in the root ``conftest.py``."""

from __future__ import annotations

import os

import hypothesis
import jax
import pytest

# Compiling dominates, so no deadline; fixed draws, so that anyone can reproduce a failure of CI.
hypothesis.settings.register_profile("local", deadline=None, max_examples=20)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=20, derandomize=True, print_blob=True, database=None
)
# For tests that are meant to fail (tests/mutations): the first failure will do, however long.
hypothesis.settings.register_profile(
    "mutations", hypothesis.settings.get_profile("ci"), phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh with Auto axes over the first devices, whatever JAX's default axis type is."""
    count = 1
    for size in shape:
        count *= size
    devices = jax.devices()
    if len(devices) < count:
        pytest.fail(f"XLA_FLAGS gives {len(devices)} devices, this test needs {count}: unset it")
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[:count])


@pytest.fixture(scope="session")
def mesh4() -> jax.sharding.Mesh:
    """Four workers on the axis "data"."""
    return make_mesh((4,), ("data",))


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """Eight workers on the axis "data"."""
    return make_mesh((8,), ("data",))


@pytest.fixture(scope="session")
def mesh2x2() -> jax.sharding.Mesh:
    """Two workers on the axis "data", each split in two over "model"."""
    return make_mesh((2, 2), ("data", "model"))


@pytest.fixture
def standard_promotion():
    """For chains with Optax's Adam, which mixes dtypes itself; our own code stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield
