"""Thousands of steps in a row on more virtual devices than cores: none of them may hang."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import ef_optax as ef

STEPS = 2000


@pytest.mark.slow
def test_two_thousand_steps_finish(mesh8):
    """One step in flight, as in the loops of the examples; a hang aborts in XLA's rendezvous."""
    params = {"w": np.zeros((5, 4), np.float32), "b": np.zeros(4, np.float32)}
    target = jax.tree.map(lambda p: np.ones((8, *p.shape), np.float32), params)
    chain = optax.chain(ef.error_feedback(ef.top_k(0.25), axis_name="data"), optax.sgd(0.05))
    tx = ef.data_parallel(chain, mesh8, "data")

    def loss(params, batch):
        return 0.5 * sum(
            ((p - t[0]) ** 2).sum()
            for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
        )

    @jax.jit
    def step(params, state):
        losses, grads = ef.worker_value_and_grad(loss, mesh8, "data")(params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, losses = jax.block_until_ready(step(params, state))
    assert int(state[0].exchange.step) == STEPS and int(state[0].exchange.skipped) == 0
    np.testing.assert_allclose(np.asarray(losses), 0.0, atol=1e-9)
    jax.tree.map(lambda p: np.testing.assert_allclose(p, 1.0, atol=1e-5), jax.device_get(params))
