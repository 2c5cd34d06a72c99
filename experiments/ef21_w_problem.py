"""Least squares with prescribed smoothness constants: the synthetic problem of the EF21-W study."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import theory

ROWS = DIMENSION = 10
REGULARISER = 1e-3


class LeastSquares(NamedTuple):
    """Arrays of the synthetic problem."""

    a: Any  # (n, 10, 10)
    b: Any  # (n, 10)


def problem(target: np.ndarray, rng: np.random.Generator) -> LeastSquares:
    """Random A_i with the prescribed largest eigenvalues of 2 A_i^T A_i/10, and b."""
    a = rng.standard_normal((len(target), ROWS, DIMENSION))
    a *= np.sqrt(target * ROWS / 2)[:, None, None] / np.linalg.norm(a, 2, (1, 2), keepdims=True)
    planted = rng.standard_normal(DIMENSION)
    noise = rng.standard_normal((len(target), ROWS))
    return LeastSquares(a, a @ planted + 0.1 * np.sqrt(target)[:, None] * noise)


def constants_of(data: LeastSquares) -> theory.Smoothness:
    """The smoothness constants of a synthetic problem."""
    return theory.least_squares(list(data.a), scale=2, nonconvex=REGULARISER)


def gradients(x: jax.Array, data: LeastSquares) -> jax.Array:
    """Gradient of every f_i, (n, 10)."""
    of_data = 2 / data.a.shape[1] * jnp.einsum("nrd,nr->nd", data.a, data.a @ x - data.b)
    return of_data + REGULARISER * 2 * x / (1 + x**2) ** 2


def of_one_row(x: jax.Array, data: LeastSquares, key: jax.Array) -> jax.Array:
    """Gradient of every f_i from one of its rows, which each worker draws at every step."""
    own = jnp.arange(len(data.b))
    drawn = jax.random.randint(key, own.shape, 0, ROWS)
    return gradients(x, LeastSquares(data.a[own, drawn][:, None], data.b[own, drawn][:, None]))
