"""What rules remember against NumPy, and its size against the arrays of a real state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef

N, AXIS = 4, "data"
PARAMS = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(3)}


def stepped():
    """A chain with two memories of different layouts, after one step of four workers."""
    tx = optax.chain(optax.trace(0.5), ef.ef21(ef.top_k(0.3), axis_name=AXIS), optax.sgd(0.1))
    tx = ef.simulate(tx, N, AXIS)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(N, *p.shape)), jnp.float32), PARAMS)
    return tx, tx.update(grads, tx.init(PARAMS), PARAMS)[1]


def test_statistics_and_histograms() -> None:
    _, state = stepped()
    probabilities = (0.25, 1.0)
    found = ef.measure.memory_statistics(state, PARAMS, probabilities=probabilities, by_leaf=True)
    drawn = ef.measure.memory_histogram(state, PARAMS, 7, by_leaf=True)
    fields = {"1/estimate": (state[1].estimate, N), "1/mean": (state[1].mean, 1)}
    assert set(drawn) == {f"{name}{leaf}" for name in fields for leaf in ("", "/w", "/b")}
    for name, (tree, workers) in fields.items():
        arrays = {f"/{leaf}": np.asarray(x).ravel() for leaf, x in tree.items()}
        arrays[""] = np.concatenate([arrays["/b"], arrays["/w"]])
        for leaf, x in arrays.items():
            norm = np.linalg.norm(x) / np.sqrt(workers)
            assert found[f"{name}/norm{leaf}"] == pytest.approx(norm, rel=1e-5)
            rows = (
                x.reshape(workers, -1)
                if leaf
                else np.concatenate([np.asarray(y).reshape(workers, -1) for y in tree.values()], 1)
            )
            largest = np.linalg.norm(rows, axis=1).max()
            assert found[f"{name}/norm_largest{leaf}"] == pytest.approx(largest, rel=1e-5)
            assert found[f"{name}/zeros{leaf}"] == pytest.approx(np.mean(x == 0))
            for p in probabilities:
                quantile = np.quantile(np.abs(x), p)
                assert found[f"{name}/quantile_{p:g}{leaf}"] == pytest.approx(quantile, rel=1e-5)
            counts, edges = np.histogram(x, 7)
            np.testing.assert_array_equal(drawn[f"{name}{leaf}"][0], counts)
            np.testing.assert_allclose(drawn[f"{name}{leaf}"][1], edges, atol=1e-6)


def test_bytes_are_those_of_the_arrays_of_one_worker() -> None:
    tx, state = stepped()
    own = jax.tree.map(lambda x, rows: x.nbytes / (N if rows else 1), state, tx.worker_axes(PARAMS))
    total = sum(jax.tree.leaves(own))
    assert ef.measure.state_bytes(tx, PARAMS) == pytest.approx(total / 23)
    like = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    for memory, each in ((None, 4), ("bfloat16", 2)):
        rule = ef.error_feedback(ef.top_k(0.01), memory=memory)
        assert ef.measure.state_bytes(rule, like) == pytest.approx(each, abs=1e-4)
    with pytest.raises(ValueError, match="no entries"):
        ef.measure.state_bytes(tx, {})


def test_refusals() -> None:
    _, state = stepped()
    with pytest.raises(ValueError, match="probabilities"):
        ef.measure.memory_statistics(state, PARAMS, probabilities=(2.0,))
    with pytest.raises(ValueError, match="bins"):
        ef.measure.memory_histogram(state, PARAMS, 0)
