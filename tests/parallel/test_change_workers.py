"""Another number of workers: the mean residual is kept for any n and m."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax.parallel.change_workers import overlap_weights

pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def lifted(n: int):
    chain = optax.chain(
        optax.trace(0.9), ef.error_feedback(ef.top_k(k=2), axis_name="w"), optax.adam(0.1)
    )
    return ef.simulate(chain, n, "w")


@functools.cache
def state_after(n: int, steps: int = 3):
    tx, params = lifted(n), jnp.zeros(7)
    state = tx.init(params)
    rng = np.random.default_rng(n)
    for _ in range(steps):
        _, state = tx.update(np.float32(rng.standard_normal((n, 7))), state, params)
    return state


@pytest.mark.parametrize(
    ("n", "m"),
    [(4, 2), (3, 5)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 4), (4, 3), (5, 1), (1, 3)]],
)
def test_mean_is_kept_and_the_run_goes_on(n: int, m: int) -> None:
    old, tx = state_after(n), lifted(m)
    new = ef.parallel.change_workers(old, tx.init(jnp.zeros(7)))
    for before, after in ((old[1].residual, new[1].residual), (old[0].trace, new[0].trace)):
        assert after.shape == (m, 7)
        np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-6)
    np.testing.assert_array_equal(new[2][0].mu, old[2][0].mu)  # equal on all workers: kept
    updates, _ = tx.update(jnp.ones((m, 7)), new, jnp.zeros(7))
    assert np.isfinite(updates).all()


@pytest.mark.parametrize(("n", "m"), [(8, 4), (4, 8)])
def test_state_moves_to_the_devices_of_the_new_mesh(n: int, m: int) -> None:
    """State that is equal on all workers too: the momentum, the counters."""
    chain = optax.chain(ef.error_feedback(ef.top_k(k=2), axis_name="w"), optax.sgd(0.1, 0.9))

    def on(count: int):
        mesh = jax.make_mesh((count,), ("w",), devices=jax.devices()[:count])
        params = jax.device_put(jnp.zeros(7), jax.NamedSharding(mesh, jax.P()))
        return ef.data_parallel(chain, mesh, "w"), params

    (old_tx, old_params), (new_tx, new_params) = on(n), on(m)
    update = jax.jit(old_tx.update)
    _, old = update(jnp.ones((n, 7)), old_tx.init(old_params), old_params)
    new = ef.parallel.change_workers(old, new_tx.init(new_params))
    assert all(len(x.sharding.device_set) == m for x in jax.tree.leaves(new))
    np.testing.assert_array_equal(new[1][0].trace, old[1][0].trace)
    updates, _ = jax.jit(new_tx.update)(jnp.ones((m, 7)), new, new_params)
    assert np.isfinite(updates).all()


def test_same_number_is_bit_exact() -> None:
    old = state_after(3)
    new = ef.parallel.change_workers(old, lifted(3).init(jnp.zeros(7)))
    jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (4, 6), (7, 7), (1, 5)])
def test_weights_mix_rows_fairly(n: int, m: int) -> None:
    weights = overlap_weights(n, m)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights.sum(0), m / n)


def test_foreign_states_are_refused() -> None:
    other = ef.simulate(ef.error_feedback(ef.top_k(k=2), axis_name="w"), 2, "w")
    with pytest.raises(ValueError, match="different chains"):
        ef.parallel.change_workers(state_after(2), other.init(jnp.zeros(7)))
    with pytest.raises(ValueError, match="leading worker axis"):
        ef.parallel.change_workers(state_after(2), lifted(2).init(jnp.zeros(8)))
