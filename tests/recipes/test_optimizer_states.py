"""Optimizers that keep Adam's moments compressed, against NumPy, with three workers.

They run in one program, each on its own copy of the parameters; the gradients are given.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.feedback.problem import AXIS, close
from tests.oracles import compress, recipes
from tests.recipes.together import trajectories

WORKERS, ROUNDS, RATE, DECAY = 3, 7, 0.1, 0.2
_rng = np.random.default_rng(4)
START = {"w": _rng.normal(size=(5, 3)), "b": np.ones(4)}
GRADIENTS = {name: _rng.normal(size=(ROUNDS, WORKERS, *x.shape)) for name, x in START.items()}

ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
MAKE = {
    "ldadam": lambda: ef.recipes.ldadam(
        RATE, 2, rho=0.7, weight_decay=DECAY, others=optax.sgd(RATE), axis_name=AXIS, **ADAM
    ),
    "ldadam of full rank": lambda: ef.recipes.ldadam(
        RATE, 3, rho=0.7, others=optax.sgd(RATE), axis_name=AXIS, **ADAM
    ),
    "dct_adamw": lambda: ef.recipes.dct_adamw(
        RATE, 2, weight_decay=DECAY, others=optax.sgd(RATE), axis_name=AXIS, **ADAM
    ),
    "micro_adam": lambda: ef.recipes.micro_adam(
        RATE,
        0.4,
        window=3,
        block=5,
        narrow=False,
        memory=ef.uniform(4, bucket=4),
        weight_decay=DECAY,
        axis_name=AXIS,
        **ADAM,
    ),
}


TOGETHER = ("dct_adamw", "ldadam", "micro_adam")
"""What runs in one program."""


@functools.cache
def run(names: tuple[str, ...]) -> dict[str, tuple[Any, Any, Any]]:
    return trajectories({name: MAKE[name]() for name in names}, WORKERS, START, GRADIENTS)


def trajectory(name: str) -> tuple[Any, Any]:
    """Parameters and states after every round."""
    return run(TOGETHER if name in TOGETHER else (name,))[name][1:]


def subspace(state: Any) -> Any:
    return state[1].inner_states["matrix"].inner_state[0]


def test_ldadam_against_numpy() -> None:
    x, state = trajectory("ldadam")
    g = GRADIENTS["w"].mean(axis=1)
    expected = list(recipes.ldadam(g, START["w"], 2, RATE, 0.8, 0.9, 0.7, 1e-3, DECAY))
    close(x["w"], [step.x for step in expected])
    close(subspace(state).residual["w"], [step.E for step in expected])


@pytest.mark.slow
def test_ldadam_of_full_rank_loses_nothing() -> None:
    (_, state) = trajectory("ldadam of full rank")
    np.testing.assert_allclose(subspace(state).residual["w"], 0, atol=1e-13)


def test_dct_adamw_against_numpy() -> None:
    """The gradients of the workers differ, so that another frequency is chosen now and then."""
    x, state = trajectory("dct_adamw")
    state = state.inner_states["matrix"].inner_state[0]
    expected = list(recipes.dct_adamw(GRADIENTS["w"], START["w"], 2, RATE, 0.8, 0.9, 1e-3, DECAY))
    assert len({tuple(step.chosen) for step in expected}) > 1
    close(x["w"], [step.x for step in expected])
    close(state.feedback.residual["w"], [step.e for step in expected])
    seen = np.sort(state.chosen["w"][:, 0], axis=-1)
    np.testing.assert_array_equal(seen, [step.chosen for step in expected])


def test_micro_adam_against_numpy() -> None:
    """All leaves: blocks of five values, of which two are kept; the residual in blocks of four."""
    x, _ = trajectory("micro_adam")
    for leaf, start in START.items():
        g = GRADIENTS[leaf].mean(axis=1).reshape(ROUNDS, -1)
        steps = recipes.micro_adam(
            g,
            start.reshape(-1),
            lambda a: blockwise(compress.top_k(2), a, 5),
            lambda a: blockwise(four_bits, a, 4),
            3,
            RATE,
            0.8,
            0.9,
            1e-3,
            DECAY,
        )
        close(x[leaf].reshape(ROUNDS, -1), [step.x for step in steps])


def blockwise(C: Any, x: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([C(x[i : i + length]) for i in range(0, len(x), length)])


def four_bits(x: np.ndarray) -> np.ndarray:
    """The nearest of 16 evenly spaced values between the smallest and the largest."""
    low, unit = x.min(), (x.max() - x.min()) / 15
    return x if unit == 0 else low + unit * np.rint((x - low) / unit)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_all_gradients_and_a_long_window_are_adam() -> None:
    """MicroAdam that sends everything; the window holds all steps."""
    ours = ef.recipes.micro_adam(0.1, 1.0, window=6, narrow=False, memory="float32")
    plain = optax.adamw(0.1, weight_decay=0.0)
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
    seen = []
    for tx in (ours, plain):
        x, state, update = params, tx.init(params), jax.jit(tx.update)
        for t in range(5):
            updates, state = update(jax.tree.map(lambda x, t=t: x * (1 + t) - 3, x), state, x)
            x = optax.apply_updates(x, updates)
        seen.append(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *seen)


def test_what_the_states_weigh() -> None:
    """Bytes for each parameter of a large matrix."""
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}

    def weight(tx: Any) -> float:
        state = jax.eval_shape(tx.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / (256 * 512)

    micro = weight(ef.recipes.micro_adam(0.1, 1 / 64, block=4096))
    assert micro == pytest.approx(0.5 + 8 / 64 + 10 / 64 * 3.5, rel=0.01)
    low = weight(ef.recipes.ldadam(0.1, 16, memory=ef.block_quantize(8, block=128)))
    assert low == pytest.approx(1 + 4 / 128 + 4 * 16 * (256 + 2 * 512) / (256 * 512), rel=0.01)


def test_greedy_lore_against_numpy() -> None:
    """Error feedback with two dense steps; the directions' random vectors are the library's."""
    codec = ef.greedy_lore(1, period=3, key=5).codec
    shape, rounds = (3, 5), 5
    gradients = np.random.default_rng(1).normal(size=(rounds, WORKERS, *shape)).astype(np.float32)
    tx = ef.simulate(ef.error_feedback(ef.Compressor(codec), axis_name=AXIS), WORKERS, AXIS)
    params = {"w": jnp.zeros(shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    E, U = np.zeros((WORKERS, *shape)), None
    for t, g in enumerate(gradients):
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        H = g + E
        if t % 3 == 0:
            out, E = H.mean(axis=0), np.zeros_like(E)
            U = np.linalg.svd(out)[0]
        else:
            workers = ef.extend.Workers(WORKERS, 0, jnp.int32(t), zlib.crc32(b"w"))
            v = jax.random.normal(workers.fold(codec.key, shared=True), (1, *shape))[0]
            lam = np.einsum("ar,nab,rb->nr", U, H, np.asarray(v)).mean(axis=0)
            best = U[:, [np.argmax(lam**2)]]
            R = np.einsum("ar,nab->nrb", best, H)
            out, E = best @ R.mean(axis=0), H - best @ R
        np.testing.assert_allclose(updates["w"], out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.residual["w"], E, rtol=1e-4, atol=1e-5)


def test_greedy_lore_with_a_period_of_one_is_dense() -> None:
    codec = ef.greedy_lore(1, period=1).codec
    assert [codec.at(t).bits((8, 9)) for t in range(3)] == [32 * 72] * 3
