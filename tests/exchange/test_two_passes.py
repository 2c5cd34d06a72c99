"""The step of scaled sign reads gradient and residual twice, writes once, and does no more."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ef_optax.compressors.quantize.scaled_sign import scaled_sign
from tests.programs import compiled

SIZE = 1 << 20
CODEC = scaled_sign().codec


def step(g: jax.Array, e: jax.Array):
    """Message and new residual; the sum is computed again for the second pass, not stored."""
    message = CODEC.encode(g + e)
    g, e = lax.optimization_barrier((g, e))
    return message, CODEC.residual(g + e, message)


@pytest.fixture(scope="module")
def program():
    like = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    return compiled(jax.jit(step, donate_argnums=1).lower(like, like))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    g = rng.standard_normal(SIZE, dtype=np.float32)
    e = rng.standard_normal(SIZE, dtype=np.float32)
    g[:4], e[:4] = [0.0, -0.0, 1.5, -2.0], [0.0, -0.0, -1.5, 0.0]
    return g, e


def test_bytes_accessed(program) -> None:
    """Twice g and e, once the new residual, a bit per value and a norm per word: 20.4 bytes."""
    assert program.cost_analysis()["bytes accessed"] / SIZE <= 20.5


def dense_instructions(program) -> list[str]:
    """The instructions of the whole program that read or make an array of the leaf's size."""
    entry = program.as_text().split("\nENTRY ")[1]
    dense, found = set(), []
    for line in entry.splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
        if match is None:
            continue
        name, shape, kind, rest = match.groups()
        operands = set(re.findall(r"%[\w.-]+", rest.split(")")[0]))
        makes = f"f32[{SIZE}]" in shape
        if makes:
            dense.add(name)
        aside = kind in ("parameter", "tuple", "get-tuple-element", "bitcast")
        if not aside and (makes or operands & dense):
            found.append(line)
    return found


def test_two_passes_and_no_third(program) -> None:
    found = dense_instructions(program)
    assert len(found) == 2, found
    assert all(" fusion(" in line for line in found)


def test_the_residual_is_written_over_the_old_one(program) -> None:
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * SIZE
    assert memory.temp_size_in_bytes < SIZE


def test_bits_and_residual_are_those_of_the_unfused_form(program) -> None:
    """Given the scale that was sent, all other numbers are exact."""
    g, e = inputs()
    message, residual = program(jnp.asarray(g), jnp.asarray(e))
    scale = np.asarray(message["scale"])[0]
    p = g + e
    np.testing.assert_allclose(scale, np.abs(p.astype(np.float64)).mean(), rtol=1e-5)
    expected = np.packbits(p >= 0, bitorder="little").view("<u4")
    np.testing.assert_array_equal(message["signs"].words, expected)
    np.testing.assert_array_equal(residual, p - np.where(p >= 0, scale, -scale))
