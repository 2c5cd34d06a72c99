"""The transformer in two stages: it is the transformer, and its messages have their bytes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from experiments import pipeline
from experiments.transformer import Size, Transformer
from tests.experiments.test_studies import results, value


def test_the_two_stages_are_the_transformer() -> None:
    model = Transformer(7, Size(2, 16, 2))
    tokens = jnp.arange(10).reshape(2, 5) % 7
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    @jax.jit
    def stages(params: dict, tokens: jax.Array) -> jax.Array:
        x = pipeline.first_half(model, params, tokens)
        return pipeline.second_half(model, params, x)

    whole = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(stages(params, tokens), whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # Optax's Adam mixes dtypes
def test_pipeline(tmp_path: Path) -> None:
    small = ["--epochs=2", "--windows=16", "--batch_size=8", "--length=8", "--width=16"]
    rows = results(pipeline.main, tmp_path / "out", *small, "--methods=dense,direct 4/8,aq-sgd 4/8")
    bits = {n: 8 * ef.block_quantize(n).bits((8, 16)) for n in (4, 8)}
    dense = 8 * 8 * 16 * 4
    assert value(rows, "bytes", method="dense") == 2 * dense
    assert value(rows, "bytes", method="direct 4/8") == (bits[4] + bits[8]) / 8
    remembered = {"method": "aq-sgd 4/8"}
    assert value(rows, "bytes", **remembered) == (bits[4] + bits[8]) / 8 + 8 * 4
    assert value(rows, "bytes_first", **remembered) == dense + bits[8] / 8 + 8 * 4
    for row in rows:
        assert 0 < row["held_out"] < 5 and 0 < row["held_out_compressed"] < 5
