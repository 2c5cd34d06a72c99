"""What every codec promises, asked of all of them alike.

One compiled function for each codec and shape answers all questions: it compresses a batch of
inputs, each with its own key, by ``vmap``.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax._base import Codec
from tests.compressors.pool import CASES, SHAPES, inputs

DRAWS = 1500
SHAPE = (37,)

names = pytest.mark.parametrize("name", CASES)


@functools.cache
def codec_of(name: str) -> Codec:
    return CASES[name].make().codec


@functools.cache
def compiled(name: str, shape: tuple[int, ...]):
    codec = codec_of(name)
    like = jax.ShapeDtypeStruct(shape, jnp.float32)

    def one(x, key):
        message = codec.encode(x, None if codec.deterministic else key)
        decoded = codec.decode(message, like)
        return message, decoded, codec.residual(x, message), codec.support(x, message)

    return jax.jit(jax.vmap(one))


def run(name: str, x: np.ndarray, seed: int = 0, keys=None):
    """Message, C(x), residual and support of a batch of inputs, as NumPy arrays."""
    if keys is None:
        keys = jax.random.split(jax.random.key(seed), len(x))
    return jax.tree.map(np.asarray, compiled(name, x.shape[1:])(jnp.asarray(x), keys))


def batch(shape: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    draws = inputs(shape)
    return list(draws), np.stack(list(draws.values()))


def ordinary() -> tuple[list[str], np.ndarray]:
    """Inputs of SHAPE for which constants must hold: no denormal numbers."""
    labels, x = batch(SHAPE)
    keep = [i for i, label in enumerate(labels) if label != "denormal"]
    return [labels[i] for i in keep], x[keep]


def squares(x: np.ndarray) -> np.ndarray:
    return np.sum(np.square(x.astype(np.float64)), axis=tuple(range(1, x.ndim)))


@names
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_message(name: str, shape: tuple[int, ...]) -> None:
    """Bits are what is packed; the residual is what is missing; zeros stay zeros."""
    codec, (labels, x) = codec_of(name), batch(shape)
    message, decoded, residual, support = run(name, x)
    fields = jax.tree.leaves(message)
    assert all(f.dtype != bool and f.ndim == 2 for f in fields)
    sent = sum(f[0].size * f.dtype.itemsize * 8 for f in fields)
    assert 0 <= sent - codec.bits(shape) < 32 * len(fields)
    assert decoded.shape == residual.shape == support.shape == x.shape
    assert np.isfinite(decoded).all() and np.isfinite(residual).all()
    scale = np.max(np.abs(x), axis=tuple(range(1, x.ndim)), initial=0, keepdims=True)
    error = np.abs(decoded.astype(np.float64) + residual - x)
    assert (error <= 4e-7 * np.maximum(scale, np.abs(decoded)) + 1e-37).all()
    assert (decoded[~support] == 0).all()
    if CASES[name].keeps_zero:
        zero = labels.index("zeros")
        assert (decoded[zero] == 0).all() and (residual[zero] == 0).all()


@names
def test_contraction(name: str) -> None:
    """E||C(x) - x||^2 <= (1 - alpha)||x||^2 for the worst inputs we know."""
    codec, (labels, x) = codec_of(name), ordinary()
    alpha = codec.alpha(SHAPE)
    if alpha is None:
        pytest.skip("no contraction constant")
    assert 0 < alpha <= 1
    draws = 1 if codec.deterministic else 200
    _, _, residual, _ = run(name, np.repeat(x, draws, axis=0))
    ratios = (squares(residual) / np.maximum(np.repeat(squares(x), draws), 1e-300)).reshape(
        -1, draws
    )
    margin = 1e-5 + (5 * ratios.std(1) / math.sqrt(draws) if draws > 1 else 0)
    assert (ratios.mean(1) <= 1 - alpha + margin).all(), dict(
        zip(labels, ratios.mean(1), strict=True)
    )


@names
def test_variance(name: str) -> None:
    """E C(x) = x and E||C(x) - x||^2 <= omega||x||^2, within five standard errors."""
    codec = codec_of(name)
    if not codec.unbiased:
        assert codec.omega(SHAPE) is None
        pytest.skip("biased")
    if codec.deterministic:
        pytest.skip("the identity")
    omega = codec.omega(SHAPE)
    for label in ("normal", "equal", "spike", "wide"):
        x = inputs(SHAPE)[label]
        _, decoded, residual, _ = run(name, np.repeat(x[None], DRAWS, axis=0), seed=1)
        decoded = decoded.astype(np.float64)
        error = decoded.std(0) / math.sqrt(DRAWS)
        if label != "wide":  # there some values are sent too rarely for these draws
            assert (np.abs(decoded.mean(0) - x) <= 5.5 * error + 1e-6 * np.abs(x).max()).all(), (
                label
            )
        if omega is not None:
            ratios = squares(residual) / squares(x[None])
            bound = omega + 5 * ratios.std() / math.sqrt(DRAWS) + 1e-6
            assert ratios.mean() <= bound, (label, ratios.mean(), omega)


@names
def test_declared_properties(name: str) -> None:
    """What is declared holds; what is declared false has a counterexample here."""
    codec, (labels, x) = codec_of(name), ordinary()
    x = x[[i for i, label in enumerate(labels) if label not in ("huge", "tiny")]]
    keys = jax.random.split(jax.random.key(3), len(x))
    _, y, _, _ = run(name, x, keys=keys)

    _, scaled, _, _ = run(name, 4 * x, keys=keys)
    assert np.array_equal(scaled, 4 * y) == codec.homogeneous

    other = np.roll(x, 1, axis=0)
    _, y2, _, _ = run(name, other, keys=keys)
    _, total, _, _ = run(name, x + other, keys=keys)
    tolerance = 2e-6 * np.max(np.abs(x) + np.abs(other))
    assert np.allclose(total, y + y2, rtol=1e-5, atol=tolerance) == codec.linear

    _, again, _, _ = run(name, x, seed=4)
    assert np.array_equal(y, again) == codec.deterministic

    if not codec.unbiased:
        draws = 1 if codec.deterministic else 200
        many = run(name, np.repeat(x, draws, axis=0))[1].astype(np.float64)
        many = many.reshape(len(x), draws, -1)
        error = np.abs(many.mean(1) - x)
        assert (error > 6 * many.std(1) / math.sqrt(draws) + 1e-3 * np.abs(x)).any()


@names
def test_mean_of_messages(name: str) -> None:
    """decode_mean is the weighted mean of what the messages decode to."""
    codec, shape = codec_of(name), (6, 11)
    x = np.stack([inputs(shape)[label] for label in ("normal", "equal", "ties")])
    message, decoded, _, _ = run(name, x, seed=5)
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = np.asarray([1.0, 0.5, 2.0], np.float32)
    mean = jax.jit(lambda m, w: codec.decode_mean(m, like, w, 3.5))(message, weights)
    expected = np.einsum("i,ijk->jk", weights, decoded) / 3.5
    np.testing.assert_allclose(mean, expected, rtol=2e-5, atol=2e-6 * np.abs(decoded).max())
