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
from tests.feedback.rules import AXIS, COMPRESSED, EVERY, N, together

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

FEW = ("atomo of rank 2", "scaled_sign")


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


QUICK = ("ef21", "two_shot")
WITHOUT = {"compressed_mean", "normalised rhm"}
"""No memory; Hessian-vector products, which no gradient here is."""

OTHERS = sorted(EVERY.keys() - {*QUICK, *WITHOUT})
GROUPS = [QUICK, *(OTHERS[i::4] for i in range(4))]


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS)
def test_no_memory_of_any_rule_grows(names) -> None:
    """Its mean square, which of sending nothing would grow by 7/3 from the 2nd to the 4th quarter.

    A memory that grows at every step, by 1% of its square, would grow by 7. The gradients at other
    points are those of the same batch at the same point.
    """
    like = {"w": np.zeros((4, 6), np.float32), "v": np.zeros(12, np.float32)}
    tx, params = together(names, elsewhere=1.0), dict.fromkeys(names, like)

    def squares(state):
        memories = [x for x in jax.tree.leaves(state) if x.ndim and x.size]
        floats = [x for x in memories if jnp.issubdtype(x.dtype, jnp.floating)]
        # One rests in the memory of the host.
        floats = [jax.device_put(x, jax.memory.Space.Device) for x in floats]
        return jnp.stack([jnp.mean(jnp.square(x.astype(jnp.float32))) for x in floats])

    def step(state, keys):
        g = {"w": jax.random.normal(keys[0], (4, 6)), "v": jax.random.normal(keys[1], (12,))}
        state = tx.update(dict.fromkeys(names, g), state, params)[1]
        return state, squares(state)

    keys = jax.random.split(jax.random.key(1), (N, STEPS, 2))
    run = lambda keys: jax.lax.scan(step, tx.init(params), keys)[1]  # noqa: E731
    sizes = np.asarray(jax.jit(jax.vmap(run, axis_name=AXIS))(keys)).mean(0)
    assert np.isfinite(sizes).all()
    quarters = sizes.reshape(4, STEPS // 4, -1).mean(1)
    assert (quarters[3] <= 2 * quarters[1]).all(), quarters[3] / quarters[1]


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (COMPRESSED["diana", "compressor"], r"use rate=0\.0625 or less"),
        (COMPRESSED["ef_bv", "compressor"], r"use lam=0\.0625 or less"),
        (COMPRESSED["gradient_shift", "compressor"], r"use rate=0\.0625 or less"),
        (COMPRESSED["ef_momentum", "compressor"], r"use a larger beta, or use .*contractive"),
        (COMPRESSED["ecq_sgd", "compressor"], r"use a smaller alpha, or use .*contractive"),
        (COMPRESSED["error_feedback, blended", "compressor"], r"use .*scale_to_contractive"),
    ],
)
def test_a_part_that_is_too_large_is_refused_with_the_remedy(make, remedy) -> None:
    """Rules that keep half of an error with 15 times the square of its input."""
    tx = make(ef.random_k(1 / 16, 5, scaled=True))
    with pytest.raises(ValueError, match=rf"15 times that of the input.*grow.*{remedy}"):
        jax.make_jaxpr(tx.init, axis_env=[(AXIS, N)])({"w": jnp.zeros(SHAPE)})
