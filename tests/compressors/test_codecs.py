"""The promises of a codec, tested on all codecs alike.

Nearly all tests of a codec use one compiled function: it compresses a batch of
inputs, each with its own key, by ``vmap``.
"""

from __future__ import annotations

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import ef_optax as ef
from ef_optax._bits.fields import exact_bits
from ef_optax._core.codec import Codec
from tests.compressors.coding import Keyed
from tests.compressors.pool import CASES, first_forms, inputs, thinned

DRAWS = 1500
ROWS = 2000

names = pytest.mark.parametrize("name", first_forms(CASES))


@functools.cache
def codec_of(name: str) -> Codec:
    return CASES[name].make().codec


@functools.cache
def rows_of(name: str) -> int:
    """Inputs in a batch: for many draws if they differ; else each bad number at each index fits."""
    codec = codec_of(name)
    if codec.unbiased or not codec.deterministic:
        return ROWS
    return 128 if type(codec).finite is Codec.finite else 16 + 3 * math.prod(CASES[name].shape)


WEIGHTS = np.asarray([1.0, 0.5, 2.0], np.float32)
TOTAL = 3.5


def compressed(codec: Codec, x, keys):
    """C(x), residual, support and finiteness of a batch of inputs, and the mean of the first."""

    def one(x, key):
        message = codec.encode(x, None if codec.deterministic else key)
        decoded = codec.decode(message, jax.ShapeDtypeStruct(x.shape, x.dtype))
        seen = codec.residual(x, message), codec.support(x, message), codec.finite(x, message)
        return message, decoded, *seen

    messages, *results = jax.vmap(one)(x, keys)
    first = jax.tree.map(lambda m: m[: len(WEIGHTS)], messages)
    like = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return results, codec.decode_mean(first, like, jnp.asarray(WEIGHTS), TOTAL)


@functools.cache
def compiled(name: str):
    return jax.jit(functools.partial(compressed, codec_of(name)))


def everything(name: str, x: np.ndarray, seed: int = 0):
    """The same as NumPy arrays; batches are filled up so that all share one compilation."""
    rows = rows_of(name)
    assert len(x) <= rows
    keys = jax.random.split(jax.random.key(seed), rows)
    results, mean = compiled(name)(np.resize(x, (rows, *x.shape[1:])), keys)
    return [np.asarray(a)[: len(x)] for a in results], np.asarray(mean)


def run(name: str, x: np.ndarray, seed: int = 0):
    """C(x), residual and support."""
    return everything(name, x, seed)[0][:3]


def batch(shape: tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    draws = inputs(shape)
    return list(draws), np.stack(list(draws.values()))


def ordinary(name: str) -> tuple[list[str], np.ndarray]:
    """Inputs for which constants must hold: no denormal numbers."""
    labels, x = batch(CASES[name].shape)
    keep = [i for i, label in enumerate(labels) if label != "denormal"]
    return [labels[i] for i in keep], x[keep]


def squares(x: np.ndarray) -> np.ndarray:
    return np.sum(np.square(x.astype(np.float64)), axis=tuple(range(1, x.ndim)))


@names
def test_bits(name: str) -> None:
    """The message has exactly as many bits as the codec says, for every shape."""
    codec = codec_of(name)
    assert codec.additive  # the aggregate is the mean of what was sent
    key = None if codec.deterministic else jax.random.key(0)
    # Of no, one and several values, and of each rank that codecs tell apart.
    shapes = [(), (7,), (0, 3), (3, 3, 2, 5)]
    cases = [(s, "float32") for s in shapes] + [((6, 11), "bfloat16")]
    for shape, dtype in cases:
        like = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        def both(x, like=like):
            message = codec.encode(x, key)
            return message, codec.decode(message, like)

        message, decoded = jax.eval_shape(both, like)
        assert decoded.shape == shape and decoded.dtype == like.dtype
        fields = jax.tree.leaves(message)
        assert all(f.dtype != bool and (f.ndim == 1 or f.shape == shape) for f in fields)
        if getattr(codec, "shared_positions", False):
            message = message["values"]  # all workers know the positions: they do not travel
        assert exact_bits(message) == codec.bits(shape, dtype), (shape, dtype)


@names
def test_message(name: str) -> None:
    """The residual is what is missing, zeros stay zeros, the mean is that of the messages."""
    labels, x = batch(CASES[name].shape)
    (decoded, residual, support, _), mean = everything(name, x)
    assert decoded.shape == residual.shape == support.shape == x.shape
    assert np.isfinite(decoded).all() and np.isfinite(residual).all()
    scale = np.max(np.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True)
    error = np.abs(decoded.astype(np.float64) + residual - x)
    assert (error <= 4e-7 * np.maximum(scale, np.abs(decoded)) + 1e-37).all()
    assert (decoded[~support] == 0).all()
    if CASES[name].keeps_zero:
        zero = labels.index("zeros")
        assert (decoded[zero] == 0).all() and (residual[zero] == 0).all()
    terms = decoded[: len(WEIGHTS)]
    expected = np.tensordot(WEIGHTS, terms, 1) / TOTAL
    np.testing.assert_allclose(mean, expected, rtol=2e-5, atol=2e-6 * np.abs(terms).max())


@names
def test_contraction(name: str) -> None:
    """E||C(x) - x||^2 <= (1 - alpha)||x||^2 for the worst inputs we know."""
    codec, (labels, x) = codec_of(name), ordinary(name)
    alpha = codec.alpha(CASES[name].shape)
    if alpha is None:
        return
    assert 0 < alpha <= 1
    draws = 1 if codec.deterministic else 200
    _, residual, _ = run(name, np.repeat(x, draws, axis=0))
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
        assert codec.omega(CASES[name].shape) is None
        return
    omega = codec.omega(CASES[name].shape)
    for label in ("normal", "equal", "spike", "wide"):
        x = inputs(CASES[name].shape)[label]
        decoded, residual, _ = run(name, np.repeat(x[None], DRAWS, axis=0), seed=1)
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
    """A declared property holds; one declared false has a counterexample here."""
    codec, (labels, x) = codec_of(name), ordinary(name)
    once = x[[i for i, label in enumerate(labels) if label not in ("huge", "tiny")]]
    x = np.repeat(once, 6, axis=0)  # some codecs toss a coin for the whole leaf
    y, _, _ = run(name, x, seed=3)

    scaled, _, _ = run(name, 4 * x, seed=3)
    largest = np.max(np.abs(y), axis=tuple(range(1, y.ndim)), keepdims=True)
    if codec.homogeneous:
        assert (np.abs(scaled - 4 * y) <= 2e-5 * largest).all()
    else:
        assert not np.array_equal(scaled, 4 * y)

    other = np.roll(x, 6, axis=0)
    y2, _, _ = run(name, other, seed=3)
    total, _, _ = run(name, x + other, seed=3)
    tolerance = 2e-6 * np.max(
        np.abs(x) + np.abs(other), axis=tuple(range(1, x.ndim)), keepdims=True
    )
    assert np.allclose(total, y + y2, rtol=1e-5, atol=tolerance) == codec.linear

    again, _, _ = run(name, x, seed=4)
    assert np.array_equal(y, again) == codec.deterministic

    if not codec.unbiased:
        x = once
        draws = 1 if codec.deterministic else 200
        many = run(name, np.repeat(x, draws, axis=0))[0].astype(np.float64)
        many = many.reshape(len(x), draws, *x.shape[1:])
        error = np.abs(many.mean(1) - x)
        assert (error > 6 * many.std(1) / math.sqrt(draws) + 1e-3 * np.abs(x)).any()


NARROW = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e4m3fn": "f8E4M3FN",
    "float8_e5m2": "f8E5M2",
}


@names
def test_no_compiler_may_skip_the_rounding(name: str) -> None:
    """Narrow floats of a message pass a barrier, so XLA cannot keep them in higher precision."""
    codec = codec_of(name)
    key = None if codec.deterministic else jax.random.key(0)
    like = jax.ShapeDtypeStruct(CASES[name].shape, "float32")
    encode = jax.jit(lambda x: codec.encode(x, key))
    narrow = {str(field.dtype) for field in jax.tree.leaves(jax.eval_shape(encode, like))} & {
        *NARROW
    }
    if not narrow:
        return
    text = encode.lower(like).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    for dtype in narrow:
        assert any(f"x{NARROW[dtype]}>" in line for line in barriers), dtype


WITH_PRODUCTS = {
    "acp_sgd": lambda: ef.acp_sgd(9),
    "arc_top_k": lambda: ef.arc_top_k(0.1),
    "gradiveq": lambda: ef.gradiveq(0.5, samples=2, period=5, slice_size=32),
    "greedy_lore": lambda: ef.greedy_lore(9),
    "power_sgd": lambda: ef.power_sgd(9),
    "svd": lambda: ef.svd(9),
    "dct_top_k": lambda: ef.dct_top_k(chunk=4, k=2),
    "dion_factors": lambda: ef.dion_factors(9),
    "shared_rows": lambda: ef.shared_rows(k=3, transform="dct"),
}


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_products_keep_the_precision_of_their_dtype(name: str) -> None:
    """A GPU or TPU rounds the factors of a float32 product unless the program forbids it."""
    compressor, x = WITH_PRODUCTS[name](), jnp.zeros((48, 32))
    text = jax.jit(compressor.update).lower(x, compressor.init(x)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("[HIGHEST, HIGHEST]" in line for line in products)


def error_ratios(name: str, x: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """||C(x) - x||^2 / ||x||^2 of each input, ``draws`` times."""
    _, residual, _ = run(name, np.repeat(x, draws, axis=0), seed)
    return (squares(residual) / np.maximum(np.repeat(squares(x), draws), 1e-300)).reshape(-1, draws)


@names
def test_basis_of_the_constants(name: str) -> None:
    """A constant is known where, and only where, the codec says so; an exact one is attained."""
    codec, case = codec_of(name), CASES[name]
    alpha, omega = codec.alpha(case.shape), codec.omega(case.shape)
    assert codec.basis in ("exact", "bound", "asymptotic", "none")
    assert (alpha is not None or omega is not None) == (codec.basis in ("exact", "bound"))
    assert (codec.basis == "exact") == (case.worst is not None)
    if case.worst is None:
        return
    draws = 1 if codec.deterministic else ROWS
    ratios = error_ratios(name, case.worst(case.shape).astype(np.float32)[None], draws, seed=5)[0]
    error = omega if omega is not None and codec.unbiased else 1 - alpha
    assert ratios.mean() >= error * (1 - 1e-4) - 5 * ratios.std() / math.sqrt(draws)


NUMBERS = (0.0, 1.0, -1.0, 1 + 2.0**-20, 0.5, -3.0, 1 / 3, 1e-3, -1e-9, 1e30, -1e30, 1e-30, 1e-42)


@names
@settings(max_examples=4)
@given(st.data())
def test_constants_on_adversarial_inputs(name: str, data) -> None:
    """Few different numbers from the edges of float32, in any number and order."""
    codec, shape = codec_of(name), CASES[name].shape
    chosen = data.draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.choice(np.float32(chosen), (8, *shape))
    draws = 1 if codec.deterministic else ROWS // 8
    decoded, residual, support = run(name, np.repeat(x, draws, axis=0))
    wide = np.repeat(x, draws, axis=0)
    assert np.isfinite(decoded).all()
    largest = np.maximum(np.abs(wide), np.abs(decoded)).reshape(len(wide), -1).max(1)
    largest = largest.reshape(-1, *[1] * len(shape)).astype(np.float64)
    assert (np.abs(decoded.astype(np.float64) + residual - wide) <= 4e-7 * largest + 1e-37).all()
    assert (decoded[~support] == 0).all()
    if 1e-42 in chosen:  # the constants are for normal numbers
        return
    alpha, omega = codec.alpha(shape), codec.omega(shape)
    ratios = (squares(residual) / np.maximum(squares(wide), 1e-300)).reshape(-1, draws)
    slack = 1e-5 + (6 * ratios.std(1) / math.sqrt(draws) if draws > 1 else 0)
    if alpha is not None:
        assert (ratios.mean(1) <= 1 - alpha + slack).all()
    if omega is not None and codec.unbiased:
        assert (ratios.mean(1) <= omega + slack).all()


@pytest.mark.parametrize("name", thinned(CASES))
def test_leaves_of_no_and_of_one_element(name: str) -> None:
    """An empty leaf decodes to an empty leaf; a leaf of one element obeys the constants."""
    codec = codec_of(name)

    @jax.jit
    def both(empty, one, keys):
        return compressed(codec, empty, keys)[0][:3], compressed(codec, one, keys)[0][:3]

    values = np.float32([[2.0], [-0.3], [0.0], [1e30]]).repeat(50, axis=0)
    keys = jax.random.split(jax.random.key(0), len(values))
    empty, (decoded, residual, _) = both(jnp.zeros((len(values), 0)), values, keys)
    assert all(a.shape == (len(values), 0) for a in empty)
    np.testing.assert_allclose(np.asarray(decoded, np.float64) + residual, values, rtol=1e-6)
    scaled = np.asarray(residual, np.float64) / np.where(values == 0, 1, values)
    ratios = np.square(scaled).reshape(4, 50)[[0, 1, 3]]
    slack = 1e-5 + 6 * ratios.std(1) / math.sqrt(50)
    for alpha in (codec.alpha((0,)), codec.alpha((1,)), codec.alpha(())):
        assert alpha is None or 0 < alpha <= 1
    if codec.alpha((1,)) is not None:
        assert (ratios.mean(1) <= 1 - codec.alpha((1,)) + slack).all()


WITH_THEIR_OWN_CHECK = [name for name in CASES if type(codec_of(name)).finite is not Codec.finite]


def with_bad_numbers(good: np.ndarray) -> np.ndarray:
    """One input with a NaN or an infinity, for each index and each of them."""
    size = good.size
    bad = np.repeat(good[None], 3 * size, axis=0).reshape(3 * size, size)
    for row, value in enumerate([np.nan, np.inf, -np.inf]):
        bad[row * size + np.arange(size), np.arange(size)] = value
    return bad.reshape(-1, *good.shape)


@pytest.mark.parametrize("name", first_forms([*WITH_THEIR_OWN_CHECK, "natural"]))
def test_finite(name: str) -> None:
    """A NaN or infinity is noticed at any index; finite values that do not overflow pass."""
    _, good = ordinary(name)
    (*_, seen), _ = everything(name, np.concatenate([good, with_bad_numbers(good[0])]))
    assert seen[: len(good)].all() and not seen[len(good) :].any()


@pytest.mark.parametrize("name", thinned([*WITH_THEIR_OWN_CHECK, "natural"]))
def test_finite_in_bfloat16(name: str) -> None:
    codec, (_, good) = codec_of(name), ordinary(name)

    def accepted(x, key):
        return codec.finite(x, codec.encode(x, None if codec.deterministic else key))

    x = jnp.asarray(np.concatenate([good, with_bad_numbers(good[0])]), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), len(x))
    seen = np.asarray(jax.jit(jax.vmap(accepted))(x, keys))
    assert seen[: len(good)].all() and not seen[len(good) :].any()


def test_the_codecs_that_tell_whether_a_leaf_is_finite() -> None:
    assert {"scaled_sign", "rms_sign", "top_k", "block_top_k", "qsgd"} <= set(WITH_THEIR_OWN_CHECK)


def test_the_parts_of_a_compressor_draw_apart() -> None:
    """What a mask or a rotation is drawn with is not what the values are rounded with."""
    key = jax.random.key(3)
    spy = ef.Compressor(Keyed(key))
    for compressor, part in (
        (ef.compose(spy, ef.random_k(0.5, 0)), "values"),
        (ef.rotate(spy, 0), "inner"),
    ):
        message = jax.jit(compressor.codec.encode)(jnp.ones(8), key)
        assert message[part].tolist() != jax.random.key_data(key).tolist()
