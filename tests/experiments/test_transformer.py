"""The transformer against NumPy, its sizes, and what dtype and remat change."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.transformer import SIZES, Size, Transformer

TINY = Size(layers=2, width=8, heads=2)
TOKENS = np.array([[3, 1, 4, 1, 5], [2, 0, 5, 3, 3]], np.int32)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Random parameters: the scales of norms too, so that one left out is seen."""
    shapes = jax.eval_shape(Transformer(6, TINY).init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 3, shapes)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def turn(x: np.ndarray) -> np.ndarray:
    """Rotary positions of (length, features) as a product of complex numbers."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head, position by position: no mask that could be wrong in the same way."""
    q, k = turn(q), turn(k)
    rows = []
    for t in range(len(q)):
        weights = np.exp(k[: t + 1] @ q[t] / math.sqrt(q.shape[1]))
        rows.append(weights @ v[: t + 1] / weights.sum())
    return np.array(rows)


def oracle(params: Any, tokens: np.ndarray) -> np.ndarray:
    x = params["embedding"]["embedding"][tokens]
    for layer in range(TINY.layers):
        p = params[f"block_{layer}"]
        y = norm(x, p["attention_norm"]["scale"])
        q, k, v = (np.split(y @ p[name]["kernel"], 2, 1) for name in ("query", "key", "value"))
        heads = [attention(*head) for head in zip(q, k, v, strict=True)]
        x = x + np.concatenate(heads, 1) @ p["output"]["kernel"]
        z = norm(x, p["perceptron_norm"]["scale"]) @ p["up"]["kernel"]
        z = z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + z @ p["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]


def test_logits_are_those_of_numpy_and_see_only_the_past(variables: Any) -> None:
    logits = jax.jit(Transformer(6, TINY).apply)(variables, TOKENS)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    for row, tokens in zip(np.asarray(logits), TOKENS, strict=True):
        np.testing.assert_allclose(row, oracle(params, tokens), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_remat_changes_the_program_and_not_the_gradient(variables: Any) -> None:
    def gradient(remat: bool) -> tuple[Any, int]:
        def loss(tree: Any) -> jax.Array:
            logits = Transformer(6, TINY, remat=remat).apply(tree, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        traced = jax.jit(jax.grad(loss)).trace(variables)
        products = str(traced.jaxpr).count("dot_general")
        return traced.lower().compile()(variables), products

    plain, products = gradient(False)
    remat, more_products = gradient(True)
    assert more_products > products
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_half_precision_is_of_activations_not_of_parameters_and_logits() -> None:
    model = Transformer(6, TINY, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norm and JAX's attention rely on it
        made = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        program = jax.make_jaxpr(model.apply)(made, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype(np.float32)}
    products = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert {x.aval.dtype for e in products for x in e.invars} == {np.dtype(jnp.bfloat16)}
    assert program.out_avals[0].dtype == jnp.float32


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("85M", "300M") else ()) for n in SIZES],
)
def test_a_size_has_the_parameters_of_its_name(name: str) -> None:
    size, vocabulary = SIZES[name], 100
    shapes = jax.eval_shape(Transformer(vocabulary, size).init, jax.random.key(0), TOKENS)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    norms = (2 * size.layers + 1) * size.width
    blocks = count - 2 * vocabulary * size.width - norms
    assert blocks == 12 * size.layers * size.width**2
    scale = {"M": 1e6, "B": 1e9}[name[-1]]
    assert blocks == pytest.approx(float(name[:-1]) * scale, rel=0.11)
