"""Schedules of a compressor, and the hook that freezes a part of an optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef


def used(compressor: ef.Compressor, steps: int) -> list[Any]:
    return [compressor.codec.at(step) for step in range(steps)]


def test_a_schedule_with_a_period_begins_again() -> None:
    a, b, c = (ef.top_k(k=k) for k in (1, 2, 3))
    periodic = ef.scheduled([2, 3], [a, b, c], period=4)
    expected = [a, a, b, c] * 3
    assert used(periodic, 12) == [x.codec for x in expected]
    inner = ef.scheduled([5], [a, b])  # a warm-up inside of it counts the same exchanges
    assert used(ef.scheduled([1], [inner, c], period=2), 9) == [
        x.codec for x in [a, c, a, c, a, c, b, c, b]
    ]
    assert periodic.bits((64,)) == a.bits((64,))  # of the stage that is used most
    with pytest.raises(
        ValueError, match="scheduled: period=3 must be a whole number of at least 4"
    ):
        ef.scheduled([2, 3], [a, b, c], period=3)


def test_a_compressor_with_state_waits_for_its_turn() -> None:
    """Its state stays while another one is active, and no step compiles again."""
    policy = ef.policies.flush(ef.power_sgd(1), 3)
    tx = ef.error_feedback(policy)
    rng = np.random.default_rng(0)
    state, update = tx.init(jnp.zeros((4, 3))), jax.jit(tx.update)
    for step in range(6):
        g = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
        _, after = update(g, state)
        same = jax.tree.map(np.array_equal, after.exchange.codec, state.exchange.codec)
        assert all(jax.tree.leaves(same)) == (step % 3 == 2)
        assert bool((np.asarray(after.residual) == 0).all()) == (step % 3 == 2)
        state = after
    assert update._cache_size() == 1


def test_a_delay_of_zero_is_none_and_until_then_nothing_is_owed() -> None:
    top = ef.top_k(k=1)
    assert ef.policies.delayed_start(top, 0) is top
    tx = ef.error_feedback(
        ef.per_leaf(lambda path, _: ef.policies.delayed_start(top, 2) if path == "late" else top)
    )
    g = {"late": jnp.array([3.0, 2.0]), "now": jnp.array([3.0, 2.0])}
    state, update = tx.init(g), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(g, state)
        dense = step < 2
        assert updates["late"].tolist() == ([3.0, 2.0] if dense else [3.0, 0.0])
        assert state.residual["late"].tolist() == [0.0, 0.0 if dense else 2.0]
        assert state.residual["now"].tolist() != [0.0, 0.0]


def test_gradual_may_be_made_while_a_program_is_traced() -> None:
    def init(params):
        policy = ef.policies.gradual(ef.top_k, optax.linear_schedule(0.9, 0.1, 40), 40)
        return ef.error_feedback(policy).init(params)

    jax.eval_shape(init, jnp.zeros(8))


@pytest.mark.parametrize(
    ("make", "field", "whole", "schedule"),
    [
        (ef.top_k, "ratio", False, optax.exponential_decay(0.5, 10, 0.5)),
        (ef.power_sgd, "rank", True, optax.linear_schedule(8, 1, 40)),
        (lambda bits: ef.block_quantize(bits), "width", True, optax.linear_schedule(8, 4, 40)),
    ],
    ids=["ratio", "rank", "bits"],
)
def test_gradual_takes_the_middle_of_each_level(make: Any, field: str, whole: bool, schedule: Any):
    policy = ef.policies.gradual(make, schedule, 40, levels=4, whole=whole)
    expected = [float(schedule(t)) for t in (5, 15, 25, 35, 40)]
    found = [getattr(policy.codec.at(t), field) for t in (0, 10, 29, 39, 40)]
    np.testing.assert_allclose(found, np.round(expected) if whole else expected)
    assert isinstance(found[0], int) == whole
    flat = ef.policies.gradual(ef.top_k, lambda step: 0.25, 40)
    assert used(flat, 41) == [ef.top_k(0.25).codec] * 41


def test_the_published_ratios_of_dgc() -> None:
    """The list of the paper, and the formula of its code: both end at 0.1%."""
    paper = ef.policies.DGC_RATIOS
    np.testing.assert_allclose(1 - np.array(paper), [0.75, 0.9375, 0.984375, 0.996, 0.999])
    assert ef.policies.dgc_warmup_ratio(5, 0.001, 5) == paper[-1]


@pytest.mark.usefixtures("standard_promotion")  # Optax's Adam mixes dtypes
def test_a_frozen_variance_is_that_of_the_step() -> None:
    """Adam's other state goes on."""
    adam = optax.scale_by_adam(eps=0.0)
    compiled = optax.GradientTransformation(adam.init, jax.jit(adam.update))
    mean = ef.compressed_mean(ef.identity(), axis_name="w")
    ways = {
        "plain": (ef.policies.freeze(adam, ["nu"], 2), lambda g: g, lambda s: s.inner),
        "compiled": (ef.policies.freeze(compiled, ["nu"], 2), lambda g: g, lambda s: s.inner),
        "simulated": (
            ef.simulate(optax.chain(mean, ef.policies.freeze(adam, ["nu"], 2)), 2, "w"),
            lambda g: jnp.stack([g - 1, g + 1]),
            lambda s: s[1].inner,
        ),
    }
    for tx, spread, inner in ways.values():
        rng, m, v = np.random.default_rng(1), np.zeros(3), np.zeros(3)
        state = tx.init(jnp.zeros(3))
        for t in range(1, 5):
            g = rng.normal(size=3)
            updates, state = tx.update(spread(jnp.asarray(g, jnp.float32)), state, jnp.zeros(3))
            m = 0.9 * m + 0.1 * g
            if t <= 2:
                v = 0.999 * v + 0.001 * g**2
            np.testing.assert_allclose(inner(state).nu, v, rtol=1e-5)
            np.testing.assert_allclose(inner(state).mu, m, rtol=1e-5)
            step = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t))
            np.testing.assert_allclose(updates, step, rtol=1e-4)
    with pytest.raises(ValueError, match="no state of tx has variance"):
        ef.policies.freeze(optax.scale_by_adam(), ["variance"], 2).init(jnp.zeros(3))


def test_the_rate_shrinks_when_compression_begins() -> None:
    """At once or along a ramp; with the corrected residual the step owed shrinks with it."""
    rate = ef.policies.compressed_rate(lambda step: 1.0 / (1 + step), 4, 0.5, ramp=2)
    found = [float(rate(step)) for step in range(8)]
    factors = [1, 1, 1, 1, 0.75, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(found, [f / (1 + t) for t, f in enumerate(factors)], rtol=1e-6)
    sudden = ef.policies.compressed_rate(1.0, 1, 0.25)
    tx = ef.error_feedback(ef.top_k(k=1), learning_rate=sudden)
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    _, state = update(jnp.array([3.0, 2.0]), state)
    updates, _ = update(jnp.array([0.0, 1.0]), state)
    assert updates.tolist() == [0.0, 1.0 + 2.0 * 1.0 / 0.25]  # the step that is owed is 2
