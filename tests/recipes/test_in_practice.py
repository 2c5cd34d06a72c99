"""Optimizers of the literature on a mesh: steps, bytes, checkpoints, another number of workers."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax._exchange.rounds import HEADER_WORDS
from tests.parallel.ways import N, workers

PARAMS = {"w": (6, 8), "b": (5,)}
MATRICES = {"others": optax.sgd(0.1), "axis_name": "data"}
TOP = ef.top_k(0.25)
MAKE = {
    "distro": lambda: ef.recipes.distro(0.1, k=2, chunk=4, axis_name="data"),
    "dion2": lambda: ef.recipes.dion2(0.1, 0.5, **MATRICES),
    "dct_adamw": lambda: ef.recipes.dct_adamw(0.1, 2, **MATRICES),
    "micro_adam": lambda: ef.recipes.micro_adam(0.1, 0.25, window=2, axis_name="data"),
    "zero_one_adam": lambda: ef.recipes.zero_one_adam(
        0.1, 1, local_step_scaler=1, compressor=ef.rms_sign(), axis_name="data"
    ),
    "one_bit_lamb": lambda: ef.recipes.one_bit_lamb(
        0.1, 1, compressor=ef.rms_sign(), axis_name="data"
    ),
    "noloco": lambda: ef.local.noloco(optax.sgd(0.1), 2, 0, mean_every=4, axis_name="data"),
    "muloco": lambda: ef.recipes.muloco(
        0.1, 2, compressor=ef.scaled_sign(), inner=optax.sgd(0.1), axis_name="data"
    ),
    "gpa": lambda: ef.recipes.gpa(
        optax.chain(ef.error_feedback(TOP, axis_name="data"), optax.sgd(0.1, 0.9)), 0.9
    ),
    "econtrol_dual_averaging": lambda: ef.recipes.econtrol_dual_averaging(
        TOP, 0.1, 0.3, ef.l1_prox(0.1), axis_name="data"
    ),
}
OWN = {"distro": 2 * 2, "dion2": 1, "dct_adamw": 1, "micro_adam": 0, "zero_one_adam": 3 * 2}
OWN |= {"one_bit_lamb": 1, "noloco": 3 * 2, "muloco": 2 * 2, "gpa": 2}
OWN |= {"econtrol_dual_averaging": 2 * 2}
"""How many leaves of the state differ between workers. The two of Dion2 and DCT-AdamW are those of
the matrix, and 1-bit LAMB has one residual of the vector of all momenta."""

BITS = {"one_bit_lamb": 53 + 32, "muloco": 53 + 2 * 32, "gpa": 12 * 38 + 2 * 35}
BITS["econtrol_dual_averaging"] = BITS["gpa"]
"""Of what is gathered: signs and scales, or values with positions of 6 bits and of 3."""


def parameters() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in PARAMS.items()}


def gradients(n: int, t: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(t)
    return {k: jnp.asarray(rng.normal(size=(n, *s)), jnp.float32) for k, s in PARAMS.items()}


@functools.cache
def on_a_mesh(name: str) -> tuple[Any, Any, Any, Any]:
    """The lifted optimizer, its compiled update, and parameters and state after two steps."""
    tx = ef.data_parallel(MAKE[name](), workers("auto"), "data")
    x = parameters()
    state = tx.init(x)
    update = jax.jit(tx.update).lower(gradients(N, 0), state, x).compile()
    for t in range(2):
        updates, state = jax.block_until_ready(update(gradients(N, t), state, x))
        x = optax.apply_updates(x, updates)
    return tx, update, x, state


@pytest.mark.slow
def test_what_differs_between_workers() -> None:
    """Only what a worker has not sent; moments of what all have received are common."""
    like = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in PARAMS.items()}
    for name, make in MAKE.items():
        own = ef.simulate(make(), N, "data").worker_axes(like)
        assert sum(map(bool, jax.tree.leaves(own))) == OWN[name], name


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BITS, "zero_one_adam", "noloco"])
def test_a_mesh_does_what_the_simulation_does(name: str) -> None:
    x, state = on_a_mesh(name)[2:]
    tx, y = ef.simulate(MAKE[name](), N, "data"), parameters()
    begun, update = tx.init(y), jax.jit(tx.update)
    for t in range(2):
        updates, begun = update(gradients(N, t), begun, y)
        y = optax.apply_updates(y, updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, x, y)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(begun), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", BITS)
def test_what_is_gathered_is_what_the_compressor_says(name: str) -> None:
    """And a header, and at most one word for each leaf to fill the last one."""
    report = ef.wire_report(on_a_mesh(name)[1])
    gathered = sum(c.message_bytes for c in report.collectives if c.kind == "gather") / 4
    assert HEADER_WORDS + BITS[name] / 32 <= gathered <= HEADER_WORDS + BITS[name] / 32 + 2
    if name == "muloco":  # dense drifts would be 53 words
        assert all(c.conditional for c in report.collectives if c.message_bytes > 8)


@pytest.mark.slow
def test_zero_one_adam_sends_signs_or_gradients_and_nothing_in_the_steps_between() -> None:
    """Signs and two scales, or 53 gradients and the flag of bad ones."""
    collectives = ef.wire_report(on_a_mesh("zero_one_adam")[1]).collectives
    assert all(c.conditional for c in collectives)
    signs = HEADER_WORDS + math.ceil((53 + 2 * 32) / 32)
    assert {(c.kind, c.message_bytes / 4) for c in collectives} == {
        ("gather", signs),
        ("reduce", 53 + 1),
    }


@pytest.mark.slow
def test_noloco_sends_its_model_to_one_other_and_nothing_is_gathered() -> None:
    report = ef.wire_report(on_a_mesh("noloco")[1])
    words = {c.kind: c.message_bytes / 4 for c in report.collectives if c.message_bytes > 16}
    assert 53 <= words["permute"] <= 53 + HEADER_WORDS and "gather" not in words


@pytest.mark.slow
def test_distro_sends_votes_and_nothing_else() -> None:
    """Two signs and two positions for each tile of up to 4 x 4, and one word for each leaf."""
    report = ef.wire_report(on_a_mesh("distro")[1])
    tiles = {"w": (6 // 3) * (8 // 4), "b": 5}  # of 3 x 4 values, and of one
    positions, votes = tiles["w"] * 2 * 4, tiles["w"] * 2 + tiles["b"]
    bits = positions + votes + 2 * 32
    assert [c.kind for c in report.collectives] == ["gather"]
    assert HEADER_WORDS + bits // 32 <= report.message_bytes / 4
    assert report.message_bytes / 4 <= HEADER_WORDS + math.ceil(bits / 32) + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_a_checkpoint_goes_on_to_the_bit(name: str, tmp_path: Any) -> None:
    """Packed windows, int8 signs and frequencies are stored with everything else."""
    tx, update, x, state = on_a_mesh(name)
    ef.save(tmp_path / name, tx, params=x, opt_state=state, step=2)
    back = ef.restore(tmp_path / name, tx, params=x)
    expected = update(gradients(N, 2), state, x)
    got = update(gradients(N, 2), back.opt_state, back.params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_another_number_of_workers(name: str) -> None:
    """What is common is kept, what is each worker's keeps its mean, and the run goes on."""
    state = on_a_mesh(name)[3]
    three, x = ef.simulate(MAKE[name](), 3, "data"), parameters()
    fresh = three.init(x)
    after = ef.parallel.change_workers(jax.device_get(state), fresh)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if old.shape == new.shape:
            np.testing.assert_array_equal(old, new)
        elif jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_allclose(np.mean(old, 0), np.mean(new, 0), rtol=1e-5, atol=1e-6)
        else:
            assert not np.any(new)  # the look-ahead begins again
    updates, _ = jax.jit(three.update)(gradients(3, 5), after, x)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
