"""Sums over the workers: joined between processes on CPUs, in order where they are simulated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ef_optax._exchange import collectives as coll
from ef_optax._exchange.transfer import sum_trees


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the devices belonged to two processes, which decides about joining and no more."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)


def summed(x: jax.Array) -> list:
    """Two trees with arrays of two dtypes: a scalar, an empty array, and others."""
    first = {"a": x.reshape(2, 3), "one": x[1], "none": jnp.zeros((0, 3))}
    return sum_trees([first, (x.astype(jnp.int32), x[::2])], "data")


def on_devices(sizes: tuple[int, ...] = (4,)) -> jax.stages.Wrapped:
    names = ("data", "model")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes))

    def local(x: jax.Array) -> list:
        return summed(x[0])

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"})
    )


X = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_the_sums_are_those_of_the_arrays(processes: None) -> None:
    first, (integers, half) = on_devices()(X)
    np.testing.assert_array_equal(first["a"], X.sum(0).reshape(2, 3))
    assert first["one"] == X[:, 1].sum() and first["none"].shape == (0, 3)
    np.testing.assert_array_equal(half, X[:, ::2].sum(0))
    np.testing.assert_array_equal(integers, X.astype(np.int32).sum(0))
    assert integers.dtype == jnp.int32


def collectives(program: jax.stages.Wrapped) -> int:
    """How many arrays are summed."""
    return str(jax.make_jaxpr(program)(X)).count("= psum")


def test_one_collective_a_dtype_between_processes(processes: None) -> None:
    assert collectives(on_devices()) == 2


def test_one_collective_an_array_in_one_process() -> None:
    assert collectives(on_devices()) == 4


def test_what_other_axes_split_is_not_joined(processes: None) -> None:
    assert collectives(on_devices((4, 2))) == 4


def test_simulated_workers_are_in_one_process(processes: None) -> None:
    answers = []

    def worker(x: jax.Array) -> jax.Array:
        answers.append(coll.one_by_one("data"))
        return x

    jax.vmap(worker, axis_name="data")(X)
    assert answers == [False]


def test_simulated_workers_are_summed_in_order() -> None:
    """As the devices of a CPU are; JAX's sum over the first axis has another order."""
    x = np.random.default_rng(0).normal(size=(3, coll.LARGE)).astype(np.float32)
    simulated = jax.jit(jax.vmap(lambda v: coll.psum(v, "data"), axis_name="data", out_axes=None))
    np.testing.assert_array_equal(simulated(x), x[0] + x[1] + x[2])
    assert "psum[" not in str(jax.make_jaxpr(simulated)(x))  # of the axis: a reduction
