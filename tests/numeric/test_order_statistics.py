"""Entries of given ranks against a sort by NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ef_optax._numeric.order_statistics import order_statistics

SIZE = 70_001
RNG = np.random.default_rng(0)
INPUTS = {
    "normal": RNG.standard_normal(SIZE),
    "all kinds of magnitude": RNG.standard_normal(SIZE) * 10.0 ** RNG.integers(-37, 38, SIZE),
    "equal": np.full(SIZE, -2.5),
    "zeros but one": np.eye(1, SIZE, 17)[0],
    "heavy ties": RNG.integers(-3, 4, SIZE).astype(float),
    "one cell": 1 + RNG.integers(0, 1000, SIZE) * 2.0**-23,
    "sorted": np.arange(SIZE) - 300.0,
    "infinities": np.where(RNG.random(SIZE) < 0.3, np.inf, -np.inf),
}


RANKS = np.unique(np.concatenate([[0, 1, SIZE - 1], RNG.integers(0, SIZE, 300)]))
entries = jax.jit(lambda x: order_statistics(x, RANKS))


@pytest.mark.parametrize("name", INPUTS)
def test_entries_are_those_of_a_sort(name: str) -> None:
    x = INPUTS[name].astype(np.float32)
    assert np.asarray(entries(x)).tolist() == np.sort(x)[RANKS].tolist()


def test_small_leaves_and_many_ranks_are_sorted() -> None:
    x = RNG.standard_normal(1000).astype(np.float32)
    assert np.asarray(order_statistics(jax.numpy.asarray(x), np.arange(1000))).tolist() == sorted(
        x.tolist()
    )
