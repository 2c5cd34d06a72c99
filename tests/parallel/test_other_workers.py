"""What belongs to another number of workers is refused: no row is taken for another's, none lost.

Half of 16 rows can be split over 8 devices as if they were one worker's each, so that only a check
of shapes sees the mistake.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import ef_optax as ef

N = 4
PARAMS = {"a": jnp.ones((6, 2)), "b": jnp.ones(5)}
GRADS = {"a": jnp.ones((N, 6, 2)), "b": jnp.ones((N, 5))}
CHAINS = {
    "residual": lambda axis: ef.error_feedback(ef.top_k(0.3), axis_name=axis),
    "estimate and momentum": lambda axis: optax.chain(
        optax.trace(0.9), ef.ef21(ef.scaled_sign(), axis_name=axis), optax.sgd(0.1)
    ),
    "shards": lambda axis: ef.error_feedback(ef.exchanges.two_shot(ef.top_k(0.3)), axis_name=axis),
}


def mesh(kind: AxisType, shape=(N,), names=("data",)) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def place(where: str):
    """The axis of N workers, and the lift over it."""
    if where == "simulate":
        return "data", lambda tx: ef.simulate(tx, N, "data")
    if where == "two axes":
        axis = ("pod", "data")
        return axis, lambda tx: ef.data_parallel(tx, mesh(AxisType.Auto, (2, 2), axis), axis)
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    return "data", lambda tx: ef.data_parallel(tx, mesh(kind), "data")


@pytest.mark.parametrize(
    ("chain", "where"),
    [
        ("residual", "auto"),
        ("residual", "explicit"),
        ("residual", "two axes"),
        ("residual", "simulate"),
        ("estimate and momentum", "simulate"),
        ("shards", "simulate"),
    ],
)
def test_a_state_of_other_workers_is_refused(chain: str, where: str) -> None:
    axis, lift = place(where)
    tx = lift(CHAINS[chain](axis))
    own, differs = tx.abstract_state(PARAMS), tx.worker_axes(PARAMS)
    for old in (1, 2, 3, 8, 16):

        def rows(x, differs, old=old):
            return jax.ShapeDtypeStruct((old, *x.shape[1:]) if differs else x.shape, x.dtype)

        with pytest.raises(ValueError, match=rf"state of {old} workers.*are 4.*change_workers"):
            tx.update(GRADS, jax.tree.map(rows, own, differs), PARAMS)


def test_shards_whose_size_depends_on_the_workers_are_refused() -> None:
    chain = CHAINS["shards"]("data")
    foreign = ef.simulate(chain, 2 * N, "data").abstract_state(PARAMS)
    with pytest.raises(ValueError, match=r"state of 8 workers.*are 4.*change_workers"):
        ef.simulate(chain, N, "data").update(GRADS, foreign, PARAMS)


@pytest.mark.parametrize("where", [pytest.param("auto", marks=pytest.mark.slow), "simulate"])
def test_it_is_refused_in_every_tracing(where: str) -> None:
    axis, lift = place(where)
    tx = lift(CHAINS["residual"](axis))
    state = tx.init(PARAMS)
    double = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.shape[:1] == (N,) else x, state)
    for run in (tx.update, jax.jit(tx.update)):
        run(GRADS, state, PARAMS)
        with pytest.raises(ValueError, match="change_workers"):
            run(GRADS, double, PARAMS)


def test_one_leaf_of_the_wrong_size_is_named() -> None:
    tx = ef.simulate(CHAINS["residual"]("data"), N, "data")
    state = tx.init(PARAMS)
    wrong = state._replace(residual={**state.residual, "a": jnp.ones((N, 6, 3))})
    with pytest.raises(ValueError, match=r"residual\['a'\] has shape \(4, 6, 3\), expected \(4, 6"):
        tx.update(GRADS, wrong, PARAMS)
    with pytest.raises(ValueError, match="another tree structure.*its own init"):
        tx.update(GRADS, (state,), PARAMS)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_arguments_and_points_of_other_workers_are_refused(rows: int) -> None:
    loss = lambda w, x, shift: jnp.sum(w) * jnp.mean(x) + shift  # noqa: E731
    for workers in (mesh(AxisType.Auto), N):
        fun = ef.worker_value_and_grad(loss, workers, "data")
        with pytest.raises(ValueError, match=rf"args\[0\] has shape \({rows},\), expected \(4,"):
            fun(jnp.ones(2), jnp.ones(8), ef.PerWorker(jnp.ones(rows)))
        points = ef.estimators.Points({"params": jnp.ones(2), "own": jnp.ones((rows, 2))})
        with pytest.raises(ValueError, match=rf"point 'own' has shape \({rows}, 2\), expected \(4"):
            fun(points, jnp.ones(8), 0.0)
