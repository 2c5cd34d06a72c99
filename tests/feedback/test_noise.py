"""Under pure noise a residual stays bounded, or the compressor is refused."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from tests.compressors.pool import CASES
from tests.exchanges.pool import EXCHANGES

SHAPE, STEPS = (32, 64), 400
CODECS = {
    **{name: case.make for name, case in CASES.items()},
    **EXCHANGES,
    "atomo of rank 2": lambda: ef.atomo(2, 3),
    "natural_dithering of many levels": lambda: ef.natural_dithering(8, 3),
    "qsgd of many levels": lambda: ef.qsgd(31, 3),
    "wangni of most values": lambda: ef.wangni(0.6, 3),
}
GROW = {
    "atomo",
    "atomo of rank 2",
    "bernoulli-rare",
    "compose-qsgd-random_block",
    "compose-qsgd-random_k",
    "natural_dithering",
    "qsgd",
    "random_k-rare",
    "wangni",
}
"""The compressors that are refused for this shape."""

FEW = ("atomo of rank 2", "qsgd of many levels", "scaled_sign")


@pytest.mark.parametrize("name", sorted(GROW))
def test_what_makes_noise_grow_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not a contraction for the leaf 'w'.*on noise.*use "):
        ef.error_feedback(CODECS[name]()).init({"w": jnp.zeros(SHAPE)})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in CODECS if n not in GROW],
)
def test_a_memory_of_noise_is_bounded(name: str) -> None:
    """By the bound that alpha gives; if alpha is unknown, by the residual of sending nothing."""
    compressor = CODECS[name]()
    tx, params = ef.error_feedback(compressor), {"w": jnp.zeros(SHAPE)}

    def step(state, key):
        g = {"w": jax.random.normal(key, SHAPE)}
        state = tx.update(g, state, params)[1]
        return state, jnp.sqrt(jnp.mean(jnp.square(state.residual["w"])))

    keys = jax.random.split(jax.random.key(1), STEPS)
    sizes = np.asarray(jax.jit(lambda s, k: jax.lax.scan(step, s, k))(tx.init(params), keys)[1])
    alpha, bound = compressor.codec.alpha(SHAPE), 1.2 * math.sqrt(STEPS)
    if alpha is not None:  # r' <= sqrt(1 - alpha) (r + 1), in the root mean square
        rest = math.sqrt(1 - alpha)
        bound = min(bound, 1.2 * rest / (1 - rest) + 1e-6) if alpha < 1 else 0.0
    assert np.isfinite(sizes).all() and sizes[-STEPS // 2 :].mean() <= bound, (bound, sizes[::50])
