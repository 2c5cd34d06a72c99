"""Common user mistakes: default meshes, misplaced parameters, forgotten lifts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef

PARAMS = {"a": jnp.ones((4, 2))}


def explicit_mesh(shape=(2,), names=("data",)):
    kinds = (AxisType.Explicit,) * len(shape)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def feedback(axis_name: str | None = "data"):
    return ef.error_feedback(ef.top_k(0.3), axis_name=axis_name)


def test_the_state_can_be_made_inside_jit_on_an_explicit_mesh():
    tx = ef.data_parallel(feedback(), explicit_mesh(), "data")
    eager, compiled = tx.init(PARAMS), jax.jit(tx.init)(PARAMS)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(jnp.shape, compiled)
    assert compiled.residual["a"].sharding.spec[0] == "data"


def test_the_abstract_state_on_an_explicit_mesh_is_that_of_init():
    tx = ef.data_parallel(feedback(), explicit_mesh(), "data")
    like, state = tx.abstract_state(PARAMS), tx.init(PARAMS)
    for x, y in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_parameters_split_over_the_worker_axis_are_refused():
    mesh = explicit_mesh()
    split = jax.device_put(PARAMS, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match=r"params\['a'\].*worker axis 'data'.*replicate"):
        ef.data_parallel(feedback(), mesh, "data").init(split)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("modle"), r"model axes are \('model',\)"),
        (P(None, None, "model"), "more entries"),
        (P("model"), "4 entries cannot be split in 3 parts"),
    ],
)
def test_specs_that_cannot_be_are_refused(spec, message):
    sizes = {"model": 3}
    tx = ef.simulate(feedback(), 2, "data", param_specs={"a": spec}, model_axes=sizes)
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_a_forgotten_lift_is_named():
    tx = feedback()
    with pytest.raises(NameError, match=r"axis_name='data'.*data_parallel"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(NameError, match="axis_name='dp'"):
        ef.simulate(feedback("dp"), 2, "data").init(PARAMS)


def test_workers_and_meshes_of_the_wrong_kind_are_named():
    with pytest.raises(ValueError, match=r"num_workers=1\.5"):
        ef.simulate(optax.identity(), 1.5, "data")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_workers=Mesh"):
        ef.simulate(optax.identity(), explicit_mesh(), "data")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mesh=8 is not"):
        ef.data_parallel(optax.identity(), 8, "data")  # type: ignore[arg-type]


def test_integer_parameters_are_named():
    with pytest.raises(TypeError, match=r"int32.*out of params"):
        feedback(None).init(jnp.zeros(3, jnp.int32))


def test_gradients_outside_jit_on_an_explicit_mesh():
    loss_fn = lambda w, x: jnp.mean((w - x) ** 2)  # noqa: E731
    arguments = (jnp.zeros(()), jnp.array([1.0, 3.0]))
    fun = ef.worker_value_and_grad(loss_fn, explicit_mesh(), "data")
    for one in (fun, jax.jit(fun)):
        losses, grads = one(*arguments)
        assert (losses.tolist(), grads.tolist()) == ([1.0, 9.0], [-2.0, -6.0])
