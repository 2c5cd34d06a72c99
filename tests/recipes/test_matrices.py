"""Optimizers that update matrices as matrices, against NumPy, on three workers that differ.

Several run in one program, each on its own copy of the parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import ef_optax as ef
from tests.feedback.problem import AXIS, close
from tests.oracles import compress, recipes
from tests.recipes.together import trajectories

WORKERS, ROUNDS, RATE = 3, 5, 0.1
WIDE, TALL = (4, 6), (6, 4)

_rng = np.random.default_rng(3)
START = {"wide": _rng.normal(size=WIDE), "tall": _rng.normal(size=TALL), "b": _rng.normal(size=3)}
GRADIENTS = {name: _rng.normal(size=(ROUNDS, WORKERS, *x.shape)) for name, x in START.items()}

OWN = {"others": optax.sgd(RATE), "weight_decay": 0.2, "axis_name": AXIS}
MAKE = {
    "dion2": lambda: ef.recipes.dion2(RATE, 0.5, momentum=0.8, **OWN),
    "dion2 of two parts": lambda: ef.recipes.dion2(RATE, 0.25, momentum=0.8, parts=2, **OWN),
    "dion2 of all": lambda: ef.recipes.dion2(RATE, 1.0, momentum=0.8, **OWN),
    "dion": lambda: ef.recipes.dion(RATE, 2, momentum=0.8, **OWN),
    "dion of full rank": lambda: ef.recipes.dion(RATE, 4, momentum=0.8, **OWN),
    "trion": lambda: ef.recipes.trion(RATE, 2, momentum=0.8, **OWN),
    "ef21_muon": lambda: ef.recipes.ef21_muon(
        RATE, ef.top_k(k=7), fresh_weight=0.3, server=ef.top_k(k=9), axis_name=AXIS
    ),
}


FAST = ("dion", "dion2", "ef21_muon", "trion")
"""What runs in one program; the others are another one."""


@functools.cache
def run(fast: bool) -> dict[str, tuple[Any, Any, Any]]:
    chosen = {name: make() for name, make in MAKE.items() if (name in FAST) == fast}
    return trajectories(chosen, WORKERS, START, GRADIENTS)


def trajectory(name: str) -> tuple[Any, Any, Any]:
    """First state, then parameters and states after every round."""
    return run(name in FAST)[name]


def matrix_state(state: Any) -> Any:
    """The first State in the chain for matrices."""
    return state.inner_states["matrix"].inner_state[0]


BASIS = scipy.fft.dct(np.eye(4), axis=0, norm="ortho")
ROWS = {"dion2": (2, 1, None), "dion2 of two parts": (1, 2, None), "trion": (2, 1, BASIS)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else (pytest.mark.slow,)) for n in ROWS]
)
def test_chosen_rows_against_numpy(name: str) -> None:
    _, x, state = trajectory(name)
    k, parts, basis = ROWS[name]
    for leaf in ("wide", "tall"):
        steps = recipes.dion2(GRADIENTS[leaf], START[leaf], k, parts, RATE, 0.8, 0.2, basis)
        expected = list(steps)
        close(x[leaf], [step.x for step in expected])
        close(matrix_state(state).momentum[leaf], [step.M for step in expected])


def test_dion_against_numpy() -> None:
    first, x, state = trajectory("dion")
    for leaf in ("wide", "tall"):
        q = matrix_state(first).exchange.codec[leaf].T
        expected = list(recipes.dion(GRADIENTS[leaf], q, START[leaf], RATE, 0.8, 0.2))
        close(x[leaf], [step.x for step in expected])
        close(matrix_state(state).momentum[leaf], [step.M for step in expected])


def flat_top_k(k: int) -> Any:
    return lambda x: compress.top_k(k)(x.reshape(-1)).reshape(x.shape)


def test_ef21_muon_against_numpy() -> None:
    _, x, state = trajectory("ef21_muon")
    for leaf, lmo in (("wide", recipes.newton_schulz), ("b", np.sign)):
        expected = recipes.ef21_muon(
            GRADIENTS[leaf],
            START[leaf],
            lmo,
            flat_top_k(7),
            flat_top_k(9),
            RATE,
            0.3,
        )
        expected = list(expected)
        close(x[leaf], [step.x for step in expected])
        close(state[0].estimate[leaf], [step.G for step in expected])
        close(state[-1].behind[leaf], [step.ahead for step in expected])


@pytest.mark.parametrize("name", ["dion", "dion2", "trion"])
def test_other_leaves_have_their_own_optimizer(name: str) -> None:
    _, x, _ = trajectory(name)
    close(x["b"], START["b"] - RATE * np.cumsum(GRADIENTS["b"].mean(axis=1), axis=0))


@pytest.mark.slow
def test_dion2_of_all_rows_is_muon() -> None:
    """With the momentum M = mu M + G."""
    _, x, _ = trajectory("dion2 of all")
    M, w = np.zeros(WIDE), START["wide"]
    for t, g in enumerate(GRADIENTS["wide"].mean(axis=1)):
        M = 0.8 * M + g
        w = w - RATE * (np.sqrt(6 / 4) * recipes.newton_schulz(M) + 0.2 * w)
        close(x["wide"][t], w)


@pytest.mark.slow
def test_dion_of_full_rank_decays_all_of_its_momentum() -> None:
    """In the mean over the workers; the basis of one round has all directions."""
    _, _, state = trajectory("dion of full rank")
    for leaf in ("wide", "tall"):
        M = np.zeros(START[leaf].shape)
        for t, g in enumerate(GRADIENTS[leaf].mean(axis=1)):
            M = 0.8 * (M + g)
            close(matrix_state(state).momentum[leaf][t].mean(axis=0), M)


def test_a_zero_gradient_leaves_the_basis_of_dion() -> None:
    """In the official code the factor of a matrix without a gradient is zero from then on."""
    tx = ef.dion_factors(1)
    x = jnp.zeros((3, 2))
    state = tx.init(x)
    out, after = jax.jit(tx.update)(x, state)
    assert not np.any(out) and np.all(np.isfinite(out))
    np.testing.assert_array_equal(*[jax.tree.leaves(s.codec)[0] for s in (state, after)])


def test_stacked_matrices_are_orthogonalised_one_by_one() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    x[:, 1] = 0
    for nonzero in (1.0, 0.6):
        tx = ef.recipes.orthogonalise(nonzero=nonzero, batch_axes=1)
        out, _ = jax.jit(tx.update)(x, tx.init(x))
        for got, one in zip(out, x, strict=True):
            np.testing.assert_allclose(got, recipes.newton_schulz(one), atol=1e-5)
    with pytest.raises(ValueError, match="orthogonalise: a leaf has shape .3,.*on_matrices"):
        ef.recipes.orthogonalise().update(jnp.zeros(3), optax.EmptyState())


def test_parts_must_divide_the_rows() -> None:
    with pytest.raises(ValueError, match="parts=2 must divide the 3 rows .*per_leaf"):
        tx = ef.compressed_mean(ef.shared_rows(0.5, parts=2))
        tx.update(jnp.ones((3, 4)), tx.init(jnp.ones((3, 4))))
