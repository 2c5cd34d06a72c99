"""``ef.new_name`` against its definition, written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import ef_optax as ef


def oracle(x: np.ndarray, step: float) -> np.ndarray:
    """The definition, line by line; independent of the library."""
    pytest.fail("write the definition of new_name here, in NumPy")


def test_new_name_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32)
    compressor = ef.new_name(0.5)
    got, _ = compressor.update(x, compressor.init(x))
    np.testing.assert_allclose(got, oracle(x, 0.5), rtol=1e-6)
