"""One-bit compressors by hand, and the exchanges that are not a mean of messages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax.compressors.quantize.rms_sign import rms_sign
from ef_optax.compressors.quantize.scaled_sign import scaled_sign
from ef_optax.compressors.quantize.sign import sign
from ef_optax.compressors.quantize.threshold_sign import threshold_sign
from ef_optax.compressors.quantize.two_bit import two_bit
from ef_optax.compressors.quantize.two_mean_sign import two_mean_sign
from ef_optax.exchanges.majority import majority_vote
from ef_optax.exchanges.perm import perm_k
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.parallel.simulation import simulate
from tests.compressors.coding import decoded


def both(codec, leaf) -> tuple:
    """What is sent of a leaf, and the residual."""
    message = codec.encode(leaf)
    return codec.decode(message, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)), codec.residual(
        leaf, message
    )


def once(compressor, x) -> list:
    return decoded(compressor, x).tolist()


def test_rms_sign_error() -> None:
    """error^2 = 2 norm2^2 (1 - norm1/(sqrt d norm2)) at (3, -1, 2, 1)."""
    x = np.asarray([3.0, -1.0, 2.0, 1.0])
    error = np.asarray(once(rms_sign(), x)) - x
    assert np.sum(error**2) == pytest.approx(2.8891165765480817, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fixed_levels_conserve_to_the_rounding_of_the_level(dtype: str) -> None:
    """``sign`` sends +-1, so the residual x - 1 of a small x is rounded like 1.

    What was sent plus the residual differs from x by up to half an epsilon of the larger of |x| and
    1, which may exceed a small x. With a scale, the difference is half an epsilon of the leaf.
    """
    sizes = 2.0 ** np.arange(-24, 8)[:, None]
    x = np.random.default_rng(0).standard_normal((32, 40)) * sizes
    x = np.asarray(x.astype(jnp.dtype(dtype)), np.float64)
    eps = float(jnp.finfo(dtype).eps)
    for compressor, level in ((sign(), 1.0), (scaled_sign(), 0.0)):
        conserved = jax.jit(jax.vmap(lambda leaf, c=compressor.codec: both(c, leaf)))
        sent, kept = (np.asarray(part, np.float64) for part in conserved(x.astype(dtype)))
        largest = np.maximum(np.abs(x), np.abs(sent)).max(1, keepdims=True)
        allowed = eps * np.maximum(largest, level) + 2.0**-24 * (dtype == "float16")
        assert (np.abs(sent + kept - x) <= allowed).all(), compressor
        if level:
            relative = np.abs(sent + kept - x).max(1) / np.abs(x).max(1)
            assert relative[0] > 0.01  # the definition, not the code


def test_two_means() -> None:
    assert once(two_mean_sign(), [3, -1, 2, 1]) == [2, -1, 2, 2]
    assert once(two_mean_sign(), [-1, -3, 2, 4]) == [-2, -2, 3, 3]
    assert two_mean_sign().bits(3) == 3 + 64


def test_two_means_of_columns() -> None:
    """A convolution's last axis is its columns; a vector is one column."""
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    matrix = x.reshape(12, 4)
    expected = np.empty_like(matrix)
    for j in range(4):
        column = matrix[:, j]
        expected[:, j] = np.where(
            column >= 0, column[column >= 0].mean(), column[column < 0].mean()
        )
    y = np.asarray(once(two_mean_sign(columns=True), x)).reshape(12, 4)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert two_mean_sign(columns=True).bits((2, 3, 2, 4)) == 48 + 4 * 64
    assert two_mean_sign(columns=True).bits(7) == 7 + 64


def steps(compressor, gradients) -> tuple[list, list]:
    """What is sent, and the residual, after each step of error feedback."""
    tx = error_feedback(compressor)
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    sent, kept = [], []
    for g in gradients:
        out, state = update(np.float32([g]), state)
        sent.append(float(out[0]))
        kept.append(float(jax.tree.leaves(state.residual)[0].reshape(-1)[0]))
    return sent, kept


def test_two_bit_saves_up() -> None:
    """Threshold .5: .1 sends nothing; with .4 more it is reached, .5 is sent and 0 is kept."""
    assert steps(two_bit(0.5), [0.1, 0.4])[0] == [0.0, 0.5]
    assert steps(two_bit(0.5), [0.1, 0.4])[1][1] == 0.0
    assert steps(two_bit(0.5), [-0.1, -0.4])[0] == [0.0, -0.5]


def test_threshold_sign_keeps_the_rest() -> None:
    """Above the threshold +1 is sent and r - 1 kept, else -1 is sent and r + 1 kept."""
    sent, kept = steps(threshold_sign(0.5), [0.75, 0.25])
    assert sent == [1.0, -1.0] and kept == [-0.25, 1.0]


def vote(gradients) -> list:
    tx = compressed_mean(majority_vote(), axis_name="data")
    tx = simulate(tx, num_workers=len(gradients), axis_name="data")
    gradients = jnp.asarray(gradients, jnp.float32)
    params = jnp.zeros(gradients.shape[1:])
    return tx.update(gradients, tx.init(params), params)[0].tolist()


def test_majority_vote_and_its_ties() -> None:
    """The majority of the signs; 0 for a tie; sign(0) = +1; a zero leaf does not vote."""
    assert vote([[5, -1, 0], [-0.1, -1, -3], [0.2, 3, -3]]) == [1, -1, -1]
    assert vote([[5, -1], [-1, -2]]) == [0, -1]
    assert vote([[0, 0], [-1, 2]]) == [-1, 1]


def shared_out(gradients) -> jax.Array:
    tx = compressed_mean(perm_k(3), axis_name="data")
    tx = simulate(tx, num_workers=len(gradients), axis_name="data")
    gradients = jnp.asarray(gradients, jnp.float32)
    params = jnp.zeros(gradients.shape[1:])
    return tx.update(gradients, tx.init(params), params)[0]


@pytest.mark.parametrize("size", [8, 7, 2])
def test_perm_k_is_exact_for_equal_inputs(size: int) -> None:
    x = np.arange(1.0, size + 1)
    np.testing.assert_allclose(shared_out([x] * 4), x, rtol=1e-6)


def test_perm_k_takes_each_coordinate_from_one_worker() -> None:
    """Four workers with constant inputs 1..4 give two of eight coordinates each."""
    y = np.asarray(shared_out([[float(i)] * 8 for i in (1, 2, 3, 4)]))
    assert np.bincount(np.round(y).astype(int), minlength=5).tolist() == [0, 2, 2, 2, 2]
    codec = perm_k(3).codec
    assert codec.traffic((9,), "float32", 4) == (96,) and codec.omega((9,), 4) == 3


def test_perm_k_conserves_under_feedback() -> None:
    """sent + residual = input on each worker, and the aggregate is the mean of what was sent."""
    tx = error_feedback(perm_k(3), axis_name="data", injection=0.5)
    tx = simulate(tx, num_workers=2, axis_name="data")
    g = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)
    out, state = tx.update(g, tx.init(jnp.zeros(5)), jnp.zeros(5))
    kept = [a for a in jax.tree.leaves(state) if a.shape == (2, 5)]
    np.testing.assert_allclose(out, np.mean(g - kept[0], axis=0), atol=1e-6)
