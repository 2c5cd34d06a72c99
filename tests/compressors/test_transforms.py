"""Rotations, and codecs in rotated coordinates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_optax._numeric.transforms import TRANSFORMS, hadamard
from ef_optax.compressors.combine.rotate import rotate
from ef_optax.compressors.quantize.block_quantize import block_quantize
from ef_optax.compressors.quantize.drive import drive
from ef_optax.compressors.quantize.eden import eden, fitted_scale, normal_centroids
from ef_optax.compressors.sparse.dct_top_k import dct_matrix, dct_top_k
from ef_optax.compressors.sparse.top_k import top_k
from tests.compressors import coding


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(compressor, x) -> np.ndarray:
    """C(x), of one draw if there is anything to draw."""
    key = None if compressor.codec.deterministic else jax.random.key(5)
    return coding.decoded(compressor, x, key)


def nmse(compressor, x: np.ndarray, draws: int) -> float:
    """E||C(x) - x||^2 / ||x||^2 over normal vectors and rotations."""
    codec, like = compressor.codec, jax.ShapeDtypeStruct(x.shape[1:], jnp.float32)

    @jax.jit
    @functools.partial(jax.vmap)
    def error(x, key):
        return jnp.sum(jnp.square(codec.decode(codec.encode(x, key), like) - x)) / jnp.sum(x**2)

    return float(jnp.mean(error(jnp.asarray(x), jax.random.split(jax.random.key(0), draws))))


def test_hadamard_matrix() -> None:
    """Entries are +-1/sqrt D by the parity of the common bits; the matrix is its own inverse."""
    size = 16
    parity = [[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)]
    expected = np.where(np.asarray(parity) == 0, 1, -1) / 4
    matrix = np.asarray(jax.jit(jax.vmap(hadamard))(np.eye(size, dtype=np.float32)))
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("size", [1, 9, 16, 31])
def test_transforms_invert(kind: str, size: int) -> None:
    """Forward and back is the identity; the two rotations keep the length."""
    length, forward, inverse = TRANSFORMS[kind]
    x, key = jnp.asarray(normal(size)), jax.random.key(1)

    @jax.jit
    def there_and_back(x):
        y = forward(x, key)
        return y, inverse(y, key, size)

    y, back = there_and_back(x)
    assert y.shape == (length(size),)
    np.testing.assert_allclose(back, x, atol=2e-6)
    if kind != "kashin":
        assert float(jnp.sum(y**2)) == pytest.approx(float(jnp.sum(x**2)), rel=1e-5)


def test_transforms_flatten() -> None:
    """A rotation spreads values and shrinks the largest one; the frame shrinks it still more."""
    x = jnp.asarray(normal(200) * np.linspace(0, 3, 200) ** 2, jnp.float32)
    keys = jax.random.split(jax.random.key(2), 20)

    def peak(kind: str) -> float:
        y = jax.jit(jax.vmap(lambda key: TRANSFORMS[kind][1](x, key)))(keys)
        return float(jnp.mean(jnp.max(jnp.abs(y), axis=1)) * np.sqrt(y.shape[1]))

    flat = float(jnp.linalg.norm(x))  # the least possible
    largest = float(jnp.max(jnp.abs(x)) * 200**0.5)
    assert flat < peak("kashin") < peak("hadamard") < 0.8 * largest
    assert peak("dft") < 0.8 * largest


def test_rotation_helps_a_coarse_code() -> None:
    """Three bits relative to the largest value lose small values, unless a rotation mixes them."""
    x = np.where(np.arange(256) % 64 == 0, 10, 1) * normal(256)
    error = np.sum((decoded(block_quantize(3, block=None), x) - x) ** 2)
    rotated = np.sum((decoded(rotate(block_quantize(3, block=None), 0), x) - x) ** 2)
    assert rotated < 0.7 * error


def test_rotate_keeps_the_inner_constants() -> None:
    codec = rotate(top_k(k=8), 0).codec
    assert codec.alpha((20,)) == 8 / 32 and codec.bits((20,)) == 32 + 8 * (32 + 5)
    assert rotate(top_k(k=8), 0, kind="kashin").codec.alpha((20,)) is None


def test_drive_scale_by_hand() -> None:
    """Signs of (1, -2, 3) times 14/6, or times 2 for the least error."""
    y = jnp.asarray([1.0, -2.0, 3.0])
    assert float(fitted_scale(jnp.sign(y), y, "unbiased")) == pytest.approx(14 / 6)
    assert float(fitted_scale(jnp.sign(y), y, "mse")) == pytest.approx(2.0)


@pytest.mark.parametrize(("scale", "expected"), [("mse", 0.3634), ("unbiased", 0.5708)])
def test_drive_error_on_normal_vectors(scale: str, expected: float) -> None:
    """1 - 2/pi and pi/2 - 1."""
    assert nmse(drive(0, scale=scale), normal(60, 1024), 60) == pytest.approx(expected, abs=0.02)


def test_eden_inner_product_and_error() -> None:
    """<C(x), x> = ||x||^2, and each bit cuts the error to about a third or less."""
    x = normal(300)
    y = decoded(eden(2, 0), x).astype(np.float64)
    assert np.dot(y, x) == pytest.approx(np.sum(x.astype(np.float64) ** 2), rel=1e-4)
    errors = [nmse(eden(bits, 0), normal(20, 1024), 20) for bits in (1, 2, 4)]
    assert errors[0] == pytest.approx(np.pi / 2 - 1, abs=0.03)
    # The least error of 2 and 4 bits for a normal is .1175 and .0095; unbiased it is e/(1 - e).
    assert errors[1] == pytest.approx(0.1175 / 0.8825, abs=0.01)
    assert errors[2] == pytest.approx(0.0095 / 0.9905, abs=0.002)


def test_centroids() -> None:
    """Published Lloyd-Max values of one, two and three bits."""
    np.testing.assert_allclose(normal_centroids(1), [-0.79788, 0.79788], atol=1e-5)
    expected = [0.2451, 0.7560, 1.3439, 2.1520]
    np.testing.assert_allclose(normal_centroids(3)[4:], expected, atol=1e-4)


def test_dct_matrix_is_orthonormal() -> None:
    for size in (1, 5, 8):
        c = dct_matrix(size)
        np.testing.assert_allclose(c @ c.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("shape", [(12,), (7, 5), (3, 3, 4, 6)])
def test_all_coefficients_are_the_identity(shape) -> None:
    """Also for sides without a common chunk, and for a convolution."""
    np.testing.assert_allclose(
        decoded(dct_top_k(4, 100), normal(*shape)), normal(*shape), atol=1e-5
    )


def test_dct_top_k_against_numpy() -> None:
    """Chunks of 4 x 3; the three largest of twelve coefficients each."""
    x = normal(8, 9)
    left, right = dct_matrix(4), dct_matrix(3)
    expected = np.zeros((8, 9))
    for i in range(0, 8, 4):
        for j in range(0, 9, 3):
            spectrum = left @ x[i : i + 4, j : j + 3] @ right.T
            order = np.argsort(-np.abs(spectrum).reshape(-1), kind="stable")
            kept = np.zeros(12)
            kept[order[:3]] = spectrum.reshape(-1)[order[:3]]
            expected[i : i + 4, j : j + 3] = left.T @ kept.reshape(4, 3) @ right
    np.testing.assert_allclose(decoded(dct_top_k(5, 3), x), expected, atol=1e-5)
    assert dct_top_k(5, 3).bits((8, 9)) == 6 * 3 * (32 + 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotate(top_k(k=1), 0, kind="haar"), "kind='haar'"),
        (lambda: drive(0, scale="l2"), "scale='l2'"),
        (lambda: eden(0, 0), "bits=0"),
        (lambda: dct_top_k(0, 1), "chunk=0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
