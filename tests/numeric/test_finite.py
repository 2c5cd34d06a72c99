"""One number that is not finite is found wherever it lies; numbers that are finite never are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ef_optax._numeric.finite import all_finite
from tests.programs import compiled

SHAPES = ((), (3,), (0, 2), (5000,), (70, 80))
"""Smaller and larger than what is joined, and empty."""


@pytest.fixture(scope="module")
def found():
    """Compiled once for each way of reading."""
    return {local: jax.jit(lambda xs, own=local: all_finite(xs, local=own)) for local in (0, 1)}


def leaves(dtype) -> list[np.ndarray]:
    largest = ml_dtypes.finfo(dtype).max / 2**14  # more than there are numbers
    return [*(np.full(shape, largest, dtype) for shape in SHAPES), np.full(2, 7, np.int32)]


@pytest.mark.parametrize("local", [0, 1], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16], ids=lambda d: d.__name__)
def test_one_bad_number_is_found(dtype, local, found) -> None:
    tree = leaves(dtype)
    assert bool(found[local](tree))
    for i, x in enumerate(tree[:-1]):
        for value in (np.nan, np.inf, -np.inf):
            for at in (0, -1)[: x.size]:
                bad = x.copy()
                bad.reshape(-1)[at] = value
                assert not bool(found[local]([*tree[:i], bad, *tree[i + 1 :]])), (i, value, at)


def test_double_precision_is_not_narrowed() -> None:
    with jax.enable_x64(True):
        assert bool(all_finite([jnp.full(3, 1e300), jnp.ones(3, jnp.float32)], local=True))
        assert not bool(all_finite([jnp.full(3, 1e300), jnp.full(3, jnp.nan)], local=True))


@pytest.mark.parametrize("squares", [False, True])
def test_a_constant_factor_hides_no_infinity(squares) -> None:
    """Compilers join constant factors; zero times them is zero whatever overflowed before."""
    seen = jax.jit(lambda x, factor: all_finite([x * factor], squares=squares), static_argnums=1)
    assert bool(seen(jnp.full(5000, 1e5), 1e10)) and not bool(seen(jnp.full(5000, 1e15), 1e30))


def test_squares_are_finite_up_to_the_root_of_the_largest_number() -> None:
    found = lambda *xs: bool(all_finite([jnp.asarray(x) for x in xs], squares=True))  # noqa: E731
    assert found(np.float32([1.8e19, 0]), np.float16([6e4])) and not found(np.float32([0, -1.9e19]))
    assert not found(np.float32([1.5e19]), np.float32([1.5e19]))  # of all leaves together


def test_nothing_is_finite() -> None:
    assert bool(all_finite([])) and bool(all_finite([jnp.arange(3)]))


def test_small_arrays_are_summed_together() -> None:
    """A sum per array would be a kernel per array."""

    def sums(count: int) -> int:
        likes = [jax.ShapeDtypeStruct((50 + i,), jnp.float32) for i in range(count)]
        run = jax.jit(lambda xs: all_finite(xs, local=True))
        return compiled(run.lower(likes)).as_text().count(" reduce(")

    assert sums(12) == sums(3)
