"""``ef.exchanges.new_name`` against its definition, in NumPy for all workers at once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef


def oracle(sent: np.ndarray) -> np.ndarray:
    """What all workers apply, given what each has sent (n, d); independent of the library."""
    pytest.fail("write the definition of new_name here, in NumPy")


def test_new_name_against_numpy() -> None:
    grads = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    rule = ef.error_feedback(ef.exchanges.new_name(ef.top_k(k=2)), axis_name="data")
    tx = ef.simulate(rule, 3, "data")
    got, state = tx.update(jnp.asarray(grads), tx.init(jnp.zeros(5)), jnp.zeros(5))
    np.testing.assert_allclose(got, oracle(grads - np.asarray(state.residual)), rtol=1e-6)
