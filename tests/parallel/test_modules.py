"""Modules of flax.nnx as parameters, whose own changes are kept; Equinox's BatchNorm."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import ef_optax as ef
from tests.parallel.ways import WHERE, N, workers

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


def loss(model, batch):
    return jnp.mean(model(batch) ** 2)


@pytest.mark.parametrize(
    "where", ["simulate", *(pytest.param(w, marks=pytest.mark.slow) for w in ("auto", "explicit"))]
)
def test_batch_norm_and_dropout_of_a_module(where: str) -> None:
    model = Model(nnx.Rngs(0))
    kernel, bias = np.asarray(model.linear.kernel[...]), np.asarray(model.linear.bias[...])
    place = workers(where)
    lift = ef.simulate if where == "simulate" else ef.data_parallel
    chain = optax.chain(ef.error_feedback(ef.identity(), axis_name="data"), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, lift(chain, place, "data"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        losses, grads = ef.worker_value_and_grad(loss, place, "data")(model, X)
        optimizer.update(model, grads)
        return losses, grads

    losses, grads = step(model, optimizer)
    # Running averages move by the mean of the workers' own statistics.
    hidden = (X @ kernel + bias).reshape(N, 4, 2)
    np.testing.assert_allclose(model.norm.mean[...], 0.1 * hidden.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(
        model.norm.var[...], 0.9 + 0.1 * hidden.var(1).mean(0), rtol=1e-5, atol=1e-6
    )
    # Each worker drops its own units; the counter moves once, the key stays.
    assert int(model.drop.rngs.count[...]) == 1
    assert model.drop.rngs.key[...] == Model(nnx.Rngs(0)).drop.rngs.key[...]
    own = np.asarray(grads["norm"]["scale"][...])
    assert losses.shape == (N,) and own.shape == (N, 2)
    np.testing.assert_allclose(model.norm.scale[...], 1 - 0.1 * own.mean(0), rtol=1e-5)
    moved = kernel - 0.1 * np.asarray(grads["linear"]["kernel"][...]).mean(0)
    np.testing.assert_allclose(model.linear.kernel[...], moved, rtol=1e-5, atol=1e-6)


def test_workers_drop_different_units_and_parts_of_a_share_too() -> None:
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
            self.mean = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            self.mean[...] = jnp.mean(x)
            return self.scale[...] * self.drop(x)

    def with_aux(model, batch):
        dropped = model(batch)
        return jnp.mean(dropped), dropped == 0

    model = Noise(nnx.Rngs(1))
    fun = ef.worker_value_and_grad(with_aux, N, "data", has_aux=True, accumulate=2)
    x = jnp.ones((N * 2 * 32, 1)) * jnp.repeat(jnp.array([1.0, 2.0, 3.0, 6.0]), 32)[:, None]
    (_, zeros), _ = fun(model, x)
    masks = {np.asarray(part).tobytes() for part in zeros.reshape(4, 32)}
    assert len(masks) == 4
    assert int(model.calls[...]) == 1 and float(model.mean[...]) == 3.0


def test_other_points_of_a_module_and_modules_among_the_arguments_are_refused() -> None:
    model = Model(nnx.Rngs(0))
    fun = ef.worker_value_and_grad(lambda w, x, m: jnp.sum(w), N, "data")
    with pytest.raises(TypeError, match=r"first argument.*nnx\.split\(module\)"):
        fun(jnp.ones(2), X, {"teacher": model})
    with pytest.raises(TypeError, match=r"nnx\.state\(model, nnx\.Param\)"):
        ef.worker_value_and_grad(loss, N, "data")(ef.estimators.Points({"params": model}), X)


def equinox_norm(mode, where, constrained: bool = False):
    """The losses and the state after a step, of BatchNorm as a loss that returns its state."""
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    norm, state = make(3, axis_name="batch", mode=mode, momentum=0.9)
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def of_state(params, batch, state):
        over_batch = jax.vmap(
            eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        if constrained:
            batch = jax.lax.with_sharding_constraint(batch, jax.P("model"))
        out, state = over_batch(batch, state)
        return jnp.mean(out**2), state

    fun = ef.worker_value_and_grad(of_state, where, "data", has_aux=True, aux_mean=True)
    (_, after), grads = jax.jit(fun)(params, X, state)
    return after.get(norm.batch_state_index if mode == "batch" else norm.ema_state_index), grads


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_batch_norm_of_equinox(where: str, mode) -> None:
    (mean, _), grads = equinox_norm(mode, workers(where))
    share = 0.1 if mode == "batch" else 1.0  # of the first step
    np.testing.assert_allclose(mean, share * X.mean(0), rtol=1e-5, atol=1e-7)
    own = X.reshape(N, 4, 3)
    normalised = (own - own.mean(1, keepdims=True)) ** 2 / (own.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(grads.weight, 2 / 3 * normalised.mean(1), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_loss_that_compares_types_may_be_split_over_a_model_axis(kind: AxisType) -> None:
    devices = jax.devices()[: 2 * N]
    mesh = jax.make_mesh((N, 2), ("data", "model"), axis_types=(kind, kind), devices=devices)
    (mean, _), _ = equinox_norm("ema", mesh)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-5, atol=1e-7)
    (mean, _), _ = equinox_norm("ema", mesh, constrained=True)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", WHERE)
def test_a_constant_and_an_argument_have_equal_types(where: str) -> None:
    """Solvers that check what they iterate compare the types of their first and next values."""
    start = jnp.float32(2.0)

    def loss(w, x):
        looks = lambda value: jax.eval_shape(lambda: value)  # noqa: E731
        assert looks(w) == looks(start), "a solver's own words"
        branch = jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: start)
        return branch * w * jnp.mean(x) + jax.lax.pmean(w, "data")

    fun = jax.jit(ef.worker_value_and_grad(loss, workers(where), "data"))
    _, grads = fun(jnp.float32(3.0), X)
    own = X.reshape(N, -1)
    expected = own.mean(1) * np.where(own[:, 0] > 0, 6.0, 2.0) + 1.0
    np.testing.assert_allclose(grads, expected, rtol=1e-6)


def test_of_two_errors_the_one_on_the_mesh_is_raised() -> None:
    def loss(w, x):
        raise ValueError("without" if jax.sharding.get_abstract_mesh().empty else "with the mesh")

    with pytest.raises(ValueError, match="with the mesh"):
        ef.worker_value_and_grad(loss, workers("auto"), "data")(jnp.float32(3.0), X)
