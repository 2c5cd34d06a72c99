"""The benchmark of many workers compares two programs that compute the same thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import many_workers


def test_both_programs_take_the_same_steps() -> None:
    with jax.enable_x64(True):
        rows = jnp.asarray(many_workers.rows_of(1000, None)[:7])
        ends = {name: make(40)(rows) for name, make in many_workers.PROGRAMS.items()}
    np.testing.assert_allclose(ends["simulate"], ends["by hand"], rtol=1e-12, atol=1e-15)
    assert np.abs(ends["by hand"] - ends["gradients alone"]).max() > 0.01  # top-1 is not nothing


def test_rows_are_of_the_size_of_a9a() -> None:
    rows = many_workers.rows_of(1000, None)
    assert rows.shape == (1000, 32, 123)
    np.testing.assert_array_equal(np.abs(rows).sum(-1), 14)
