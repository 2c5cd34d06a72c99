"""Updates that run while the next gradient is computed: the recurrence, the thread, the errors."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

N, D, RATE, STEPS = 4, 6, 0.1, 6


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    return np.where(np.isin(np.arange(x.size), kept), x, 0)


def late_loop(mesh: jax.sharding.Mesh, centres: np.ndarray) -> tuple[jax.Array, list[np.ndarray]]:
    """Trains ``|x - centre_i|^2 / 2``; state and parameters are donated; a checkpoint at half."""
    rule = ef.error_feedback(ef.top_k(k=2), axis_name="data")
    tx = ef.data_parallel(optax.chain(rule, optax.sgd(RATE)), mesh, "data")
    gradient = jax.jit(lambda params: params - centres)
    apply = jax.jit(optax.apply_updates, donate_argnums=0)
    params = jax.device_put(jnp.zeros(D), jax.NamedSharding(mesh, jax.P()))
    update = jax.jit(tx.update, donate_argnums=1)
    late = ef.parallel.Overlapped(update, tx.init(params), jnp.zeros_like(params))
    seen = []
    for t in range(STEPS):
        if t == STEPS // 2:
            updates, state = late.finish()
            late = ef.parallel.Overlapped(update, state, updates)
        params = apply(params, late(gradient(params), params))
        seen.append(np.asarray(params))
    return late.finish()[0], seen


def test_the_update_of_the_step_before_is_applied() -> None:
    """Against NumPy, through a checkpoint."""
    mesh = jax.make_mesh((N,), ("data",), devices=jax.devices()[:N])
    centres = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    last, seen = late_loop(mesh, centres)
    x, e, waiting = np.zeros(D), np.zeros((N, D)), np.zeros(D)
    for got in seen:
        p = x - centres + e
        c = np.stack([top(row, 2) for row in p])
        e = p - c
        x, waiting = x + waiting, -RATE * c.mean(0)
        np.testing.assert_allclose(got, x, atol=1e-6)
    np.testing.assert_allclose(last, waiting, atol=1e-6)


def test_another_thread_starts_every_update_and_knows_the_mesh() -> None:
    threads, meshes = [], []

    def update(grads, state, *, scale):
        threads.append(threading.get_ident())
        meshes.append(jax.sharding.get_mesh())
        return grads * scale, state + 1

    late = ef.parallel.Overlapped(update, 0, jnp.zeros(()))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    assert late(jnp.ones(()), scale=2.0) == 0
    with jax.set_mesh(mesh):
        assert late(jnp.ones(()), scale=3.0) == 2
    assert late.finish() == (3, 2)
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()
    assert meshes[0].empty and meshes[1] == mesh


def test_after_an_error_the_step_can_be_taken_again() -> None:
    def update(grads, state):
        if grads < 0:
            raise ValueError("negative")
        return -grads, state + 1

    late = ef.parallel.Overlapped(update, 0, jnp.zeros(()))
    late(jnp.ones(()))
    with pytest.raises(ValueError, match="negative"):
        late(-jnp.ones(()))
    assert late(2 * jnp.ones(())) == -1
    assert late.finish() == (-2, 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="update=3 is not callable"):
        ef.parallel.Overlapped(3, (), ())  # pyright: ignore[reportArgumentType]
    late = ef.parallel.Overlapped(lambda grads, state: (grads, state), (), jnp.zeros(2))
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(late)(jnp.ones(2))
