"""Optimizers of the literature against NumPy, on three workers that differ, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.feedback.problem import AXIS, GRADS, ROUNDS, START, WORKERS, close, per_leaf, run
from tests.oracles import compress, ef14, iterates, recipes
from tests.oracles import run as take

pytestmark = pytest.mark.usefixtures("standard_promotion")

DENSE = np.array([True] * 3 + [False] * 4)  # the vector of the problem, and not its matrix


def mean(x):
    return np.mean([grad(x) for grad in GRADS], axis=0)


def falling(t):
    return 0.05 / (1 + t)


def warming(t: int) -> int:
    """DGC's warm-up over two epochs of three steps to a quarter of the matrix."""
    return [3, 2, 1][min(t // 3, 2)]


def dgc_sgd(**options):
    return ef.recipes.dgc_sgd(0.02, momentum=0.8, weight_decay=0.1, axis_name=AXIS, **options)


CASES = {
    "ef_sign_sgd": (
        lambda: ef.recipes.ef_sign_sgd(falling, axis_name=AXIS),
        lambda: ef14.step_units(GRADS, per_leaf(compress.scaled_sign), START, falling),
    ),
    "ef_sign_sgd with top-k": (
        lambda: ef.recipes.ef_sign_sgd(falling, compressor=ef.top_k(k=2), axis_name=AXIS),
        lambda: ef14.step_units(GRADS, per_leaf(compress.top_k(2)), START, falling),
    ),
    "signum": (
        lambda: ef.recipes.signum(0.05, 0.7, weight_decay=0.1, axis_name=AXIS),
        lambda: recipes.signum(GRADS, START, 0.05, 0.7, 0.1),
    ),
    "dgc_sgd": (
        lambda: dgc_sgd(ratio=0.25),
        lambda: recipes.dgc_sgd(GRADS, lambda t: 1, DENSE, START, 0.02, 0.8, 0.1, False),
    ),
    "dgc_sgd, Nesterov and warm-up": (
        lambda: dgc_sgd(ratio=0.25, nesterov=True, steps_per_epoch=3, warmup_epochs=2),
        lambda: recipes.dgc_sgd(GRADS, warming, DENSE, START, 0.02, 0.8, 0.1, True),
    ),
}
SLOW = {"ef_sign_sgd with top-k", "dgc_sgd"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_recipes_against_numpy(name: str) -> None:
    make, oracle = CASES[name]
    close(run(ef.simulate(make(), WORKERS, AXIS)).x, iterates(oracle(), ROUNDS))


def test_power_sgd_momentum_against_numpy() -> None:
    """For a matrix, whose gradients are noise; the first factor is that of the state."""
    gradients = np.random.default_rng(0).standard_normal((8, WORKERS, 5, 4))
    x = np.random.default_rng(1).standard_normal((5, 4))
    with jax.enable_x64(True):
        tx = ef.recipes.power_sgd_momentum(0.1, 1, momentum=0.8, weight_decay=0.1, axis_name=AXIS)
        tx, params = ef.simulate(tx, WORKERS, AXIS), jnp.asarray(x)
        state, update = tx.init(params), jax.jit(tx.update)
        q = np.asarray(state[0].exchange.codec).T
        expected = take(recipes.power_sgd_momentum(gradients, q, x, 0.1, 0.8, 0.1), 8)
        for g, step in zip(gradients, expected, strict=True):
            updates, state = update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            close(params, step.x)
            close(state[0].residual, step.e)


def sgd(step):
    """Gradient descent on the mean, whose step is made from gradient and iterate."""
    x, memory = START, np.zeros_like(START)
    while True:
        change, memory = step(mean(x), x, memory)
        x = x - change
        yield x


def twice(g, x, m):
    m = 0.8 * m + g + 0.1 * x
    return 0.02 * (g + 0.1 * x + m), m


EDGES = {
    "EF-signSGD(C = I) = SGD": (
        lambda: ef.recipes.ef_sign_sgd(0.05, compressor=ef.identity(), axis_name=AXIS),
        lambda g, x, m: (0.05 * g, m),
    ),
    "PowerSGD with momentum, full rank = SGD with its momentum": (
        lambda: ef.recipes.power_sgd_momentum(
            0.02, 2, momentum=0.8, weight_decay=0.1, axis_name=AXIS
        ),
        twice,
    ),
}


@pytest.mark.parametrize("edge", EDGES)
def test_without_compression_it_is_plain(edge: str) -> None:
    make, step = EDGES[edge]
    iterator = sgd(step)
    close(run(ef.simulate(make(), WORKERS, AXIS)).x, [next(iterator) for _ in range(ROUNDS)])


def test_dgc_sgd_of_vectors_is_sgd_with_momentum_and_coupled_weight_decay() -> None:
    """Dense leaves are never masked, so that weight decay and gradients have one momentum."""
    params = {"x": jnp.asarray(START, jnp.float32)}
    for nesterov in (False, True):
        ours = ef.recipes.dgc_sgd(0.02, momentum=0.8, weight_decay=0.1, nesterov=nesterov)
        plain = optax.chain(
            optax.add_decayed_weights(0.1), optax.sgd(0.02, momentum=0.8, nesterov=nesterov)
        )
        seen = []
        for tx in (ours, plain):
            x, state, path = params, tx.init(params), []
            for _ in range(4):
                updates, state = tx.update({"x": 0.5 * x["x"]}, state, x)
                x = optax.apply_updates(x, updates)
                path.append(x["x"])
            seen.append(path)
        np.testing.assert_allclose(*seen, rtol=1e-6)


def test_recipes_by_name() -> None:
    text = "dgc_sgd(0.1, 0.01, nesterov=True)"
    assert isinstance(ef.parse(text).build("data"), optax.GradientTransformation)
    assert str(ef.parse(f"recipes.{text}")) == f"recipes.{text}"


def test_what_differs_between_workers() -> None:
    """Momentum after the exchange is common, momentum before it is each worker's own."""
    params = {"w": jnp.zeros((3, 2))}
    own = ef.simulate(ef.recipes.signum(0.1, axis_name=AXIS), 2, AXIS).worker_axes(params)
    assert all(jax.tree.leaves(own[0].ema))
    tx = ef.recipes.power_sgd_momentum(0.1, 1, axis_name=AXIS)
    own = ef.simulate(tx, 2, AXIS).worker_axes(params)
    assert all(jax.tree.leaves(own[0].residual)) and not any(jax.tree.leaves(own[2]))
