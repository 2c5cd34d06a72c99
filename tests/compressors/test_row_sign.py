"""``ef.row_sign`` against its definition, written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import ef_optax as ef
from tests.compressors.coding import coded, decoded


def oracle(x: np.ndarray) -> np.ndarray:
    """The definition, row by row."""
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        out[index] = np.mean(np.abs(x[index])) * np.where(x[index] >= 0, 1.0, -1.0)
    return out


@pytest.mark.parametrize("shape", [(7,), (6, 11), (2, 3, 5), (4, 1)])
def test_row_sign_against_numpy(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    _, y, residual = coded(ef.row_sign(), x)
    np.testing.assert_allclose(y, oracle(x.astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(y + residual, x, rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_occur_do_not_move() -> None:
    """With one scale for the leaf they do: that is why there is one for each row."""
    x = np.zeros((5, 4), np.float32)
    x[1] = [1.0, -2.0, 3.0, -4.0]
    rows, leaf = decoded(ef.row_sign(), x), decoded(ef.scaled_sign(), x)
    others = [0, 2, 3, 4]
    assert (rows[others] == 0).all() and (leaf[others] != 0).all()
    np.testing.assert_allclose(rows[1], [2.5, -2.5, 2.5, -2.5])


def test_a_vector_is_one_row() -> None:
    x = np.random.default_rng(1).normal(size=33).astype(np.float32)
    np.testing.assert_allclose(decoded(ef.row_sign(), x), decoded(ef.scaled_sign(), x), rtol=1e-6)
