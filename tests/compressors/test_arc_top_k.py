"""Rows that all workers choose together by a sketch, against NumPy, and what they cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._core.workers import Workers
from tests.conftest import make_mesh
from tests.programs import exchange_of

WORKERS = 3
SHAPES = {"bias": (7,), "conv": (2, 3, 8), "dense": (6, 8), "wide": (5, 40)}
K = {"conv": 2, "dense": 2, "wide": 2}  # ceil(0.3 * 6) and ceil(0.3 * 5)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expected(gs: np.ndarray, e: np.ndarray, V: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One step of the definition in NumPy, for matrices (workers, rows, columns)."""
    p = gs.astype(np.float64) + e
    energy = np.square(np.mean(p @ V, axis=0)).sum(axis=1)
    rows = np.argsort(-energy, kind="stable")[:k]
    out, kept = np.zeros(p.shape[1:]), p.copy()
    out[rows] = p[:, rows].mean(axis=0)
    kept[:, rows] = 0
    return out, kept


def test_arc_top_k_between_workers() -> None:
    """Outputs and residuals of three workers over three steps; equal widths share directions."""
    compressor = ef.arc_top_k(0.3, rank=1, key=5)
    tx = ef.simulate(ef.error_feedback(compressor, axis_name="w"), WORKERS, "w")
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    kept = {name: np.zeros((WORKERS, *shape)) for name, shape in SHAPES.items()}
    drawn, draw = [], jax.jit(compressor.codec.directions, static_argnums=(1, 2))
    for step in range(3):
        gs = {
            name: normal(WORKERS, *shape, seed=10 * step + i)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        updates, state = update(jax.tree.map(jnp.asarray, gs), state, params)
        key = Workers(WORKERS, 0, jnp.int32(step)).fold(compressor.codec.key, shared=True)
        np.testing.assert_allclose(updates["bias"], gs["bias"].mean(0), atol=1e-6)
        assert not np.any(state.residual["bias"])
        for name, k in K.items():
            shape = SHAPES[name]
            V = np.asarray(draw(key, shape[-1], jnp.float32), np.float64).T
            drawn.append(V)
            matrices = (WORKERS, -1, shape[-1])
            out, left = expected(gs[name].reshape(matrices), kept[name].reshape(matrices), V, k)
            kept[name] = left.reshape(WORKERS, *shape)
            np.testing.assert_allclose(updates[name], out.reshape(shape), atol=2e-6)
            np.testing.assert_allclose(state.residual[name], kept[name], atol=2e-6)
    widths = [V.tobytes() for V in drawn]
    assert len(set(widths)) == 3 * 2  # each step draws directions for two widths


def test_the_directions_are_standard_normal() -> None:
    V = ef.arc_top_k(k=1, rank=8).codec.directions(jax.random.key(3), 5000, jnp.float32)
    assert V.shape == (8, 5000)
    gram = np.asarray(V @ V.T) / 5000  # its deviations from the identity are about 1.4 / sqrt 5000
    np.testing.assert_allclose(gram, np.eye(8), atol=0.1)


def test_rows_are_those_of_the_mean_and_are_found_by_their_norm() -> None:
    """Rows that cancel between two workers are not sent, however large they are on each."""
    common, own = np.zeros((64, 32), np.float32), np.zeros((64, 32), np.float32)
    common[[3, 40]] = normal(2, 32)
    own[10] = 100.0
    tx = ef.simulate(ef.compressed_mean(ef.arc_top_k(k=2), axis_name="w"), 2, "w")
    grads, params = jnp.stack([common + own, common - own]), jnp.zeros((64, 32))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.flatnonzero(np.any(np.asarray(updates) != 0, axis=1)).tolist() == [3, 40]
    np.testing.assert_allclose(updates, common, atol=1e-5)


def test_a_leaf_does_not_depend_on_its_neighbours_or_on_how_it_is_stored() -> None:
    """Alone, in a batch, too large for a stack, or as layers of one scanned leaf: the same rows."""
    two = normal(2, 260, 300)
    tree = {"a": jnp.asarray(two[0]), "b": jnp.asarray(two[1])}
    compressor, scanned = ef.arc_top_k(0.1), ef.arc_top_k(0.1, batch_axes=1)

    @jax.jit
    def all_ways(tree):
        def once(compressor, x):
            return compressor.update(x, compressor.init(x))[0]

        stack = jnp.stack([tree["a"], tree["b"]])
        return once(compressor, tree), once(compressor, tree["b"]), once(scanned, stack)

    together, alone, layers = all_ways(tree)
    assert np.count_nonzero(np.any(np.asarray(alone) != 0, axis=1)) == 26
    np.testing.assert_array_equal(together["b"], alone)
    np.testing.assert_array_equal(layers[1], alone)
    np.testing.assert_array_equal(layers[0], together["a"])


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_leaves_that_would_not_shrink_are_averaged(ratio: float) -> None:
    """All rows, or a sketch that is longer than what it saves: the dense mean in one round."""
    codec = ef.arc_top_k(ratio).codec
    assert codec.traffic((10, 40), "float32", 4) == (32 * 400,)
    assert ef.arc_top_k(0.8).codec.traffic((10, 40), "float32", 4) == (32 * 40, 32 * 320)
    tx = ef.simulate(ef.compressed_mean(ef.arc_top_k(ratio), axis_name="w"), WORKERS, "w")
    gs, params = jnp.asarray(normal(WORKERS, 10, 40)), jnp.zeros((10, 40))
    np.testing.assert_allclose(tx.update(gs, tx.init(params), params)[0], gs.mean(0), atol=1e-6)


MODEL = {"embed": (512, 64), "bias": (64,), "up": (64, 256), "down": (64, 256)}


def report(compressor: ef.Compressor, n: int) -> ef.WireReport:
    """The collectives of one exchange of the model between n workers, as compiled."""
    mesh = make_mesh((n,), ("data",))
    return ef.wire_report(exchange_of(compressor.codec, MODEL, mesh))


@pytest.mark.slow
def test_link_bytes_do_not_grow_with_the_workers() -> None:
    """Two all-reduces of exactly the declared bits, on 2, 4 and 8 workers."""
    arc, top = ef.arc_top_k(0.05), ef.top_k(0.05)
    sketch, rows = 4 * (512 + 2 * 64) + 64, 26 * 64 + 2 * 4 * 256  # the bias travels with the first
    params = {name: jnp.zeros(shape) for name, shape in MODEL.items()}
    assert ef.message_bits(arc, params) == 32 * (sketch + rows)
    message = 4 * (sketch + rows + 1)  # and a number that shows whether all values are finite
    for n in (2, 4, 8):
        wire = report(arc, n)
        assert [c.kind for c in wire.collectives] == ["reduce", "reduce"]
        assert wire.message_bytes == message
        assert wire.link_bytes == 4 * (n - 1) * message // n
    # A message of as many values that is gathered is shorter, but not on the link of 8 workers.
    gathered = ef.message_bits(top, params) // 8
    assert gathered < message and 2 * wire.link_bytes < 2 * (8 - 1) * gathered


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ef.arc_top_k(), ValueError, "exactly one"),
        (lambda: ef.arc_top_k(0.1, rank=0), ValueError, "rank=0"),
        (lambda: ef.arc_top_k(0.1, batch_axes=-1), ValueError, "batch_axes=-1"),
        (lambda: ef.arc_top_k(0.1, key="seed"), TypeError, "key='seed'"),
    ],
)
def test_bad_arguments(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
