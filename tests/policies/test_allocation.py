"""Levels by leaf under a common limit: against all choices, by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef

LEVELS = [ef.top_k(k=1), ef.top_k(k=4), ef.block_quantize(4), ef.identity()]
RNG = np.random.default_rng(4)
GRADS = {
    "heavy": jnp.asarray(RNG.standard_t(1.5, size=(6, 4)), jnp.float32),
    "spike": jnp.asarray(9 * np.eye(16)[5], jnp.float32),
    "flat": jnp.asarray(np.sign(RNG.normal(size=20)), jnp.float32),
    "small": jnp.asarray(0.01 * RNG.normal(size=8), jnp.float32),
}


def table() -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and bits by leaf and level, in the order of the tree's leaves."""
    leaves, errors, bits = jax.tree.leaves(GRADS), [], []
    for level in LEVELS:  # each leaf on its own, in one program
        alone = jax.jit(lambda xs, level=level: [level.update(x, level.init(x))[0] for x in xs])
        pairs = zip(leaves, jax.device_get(alone(leaves)), strict=True)
        errors.append([((np.asarray(x, float) - sent) ** 2).sum() for x, sent in pairs])
        bits.append([level.bits(x.shape) for x in leaves])
    return np.array(errors).T, np.array(bits).T


def picks(compressor: ef.Compressor) -> list[int]:
    codecs = [level.codec for level in LEVELS]
    located = jax.tree_util.tree_leaves_with_path(GRADS)
    return [codecs.index(compressor.codec.for_leaf(p[0].key, x)) for p, x in located]


def totals(table: np.ndarray, choice: Any) -> float:
    return sum(table[i][c] for i, c in enumerate(choice))


CHOICES = list(itertools.product(range(len(LEVELS)), repeat=len(GRADS)))


def test_l_greco_sends_the_fewest_bits_for_the_error_of_one_level() -> None:
    errors, bits = table()
    found = picks(ef.policies.l_greco(GRADS, LEVELS, baseline=1, parts=1 << 16))
    limit = errors[:, 1].sum()
    least = min(totals(bits, c) for c in CHOICES if totals(errors, c) <= limit)
    assert totals(errors, found) <= limit and totals(bits, found) == least
    assert least < bits[:, 1].sum()
    assert picks(ef.policies.l_greco(GRADS, LEVELS, baseline=3)) == [
        2,
        3,
        3,
        0,
    ]  # flat, heavy, small, spike


def test_the_least_error_within_the_bytes() -> None:
    errors, bits = table()
    for budget in (60, 120):
        found = picks(ef.policies.within_bytes(GRADS, LEVELS, budget, parts=8 * budget))
        least = min(totals(errors, c) for c in CHOICES if totals(bits, c) <= 8 * budget)
        assert totals(bits, found) <= 8 * budget
        np.testing.assert_allclose(totals(errors, found), least, rtol=1e-6)
        for parts in range(20, 60, 3):  # however coarse, the limit holds
            found = picks(ef.policies.within_bytes(GRADS, LEVELS, budget, parts=parts))
            assert totals(bits, found) <= 8 * budget, parts
    with pytest.raises(ValueError, match="within_bytes: budget=3 is too small: the cheapest"):
        ef.policies.within_bytes(GRADS, LEVELS, 3)


def test_a_contraction_is_held_by_the_cheapest_level() -> None:
    errors, bits = table()
    norms = [float((np.asarray(x, float) ** 2).sum()) for x in jax.tree.leaves(GRADS)]
    for alpha in (0.3, 0.99):
        for levels in (LEVELS, LEVELS[::-1]):
            for i, pick in enumerate(picks(ef.policies.with_contraction(GRADS, levels, alpha))):
                enough = [c for c in range(len(LEVELS)) if errors[i][c] <= (1 - alpha) * norms[i]]
                assert pick == min(enough, key=lambda c: bits[i][c])
    weak = ef.policies.with_contraction(GRADS, LEVELS[:2], 1.0)
    like = jax.ShapeDtypeStruct((20,), jnp.float32)
    assert weak.codec.for_leaf("flat", like) == LEVELS[1].codec  # nothing holds it: the best one


def test_accordion_is_light_where_the_norm_changes() -> None:
    light, heavy = ef.power_sgd(4), ef.power_sgd(1)
    before = {"same": 2.0, "half": 2.0, "grown": 2.0, "new": 0.0}
    now = {"same": jnp.float32(1.5), "half": 1.0, "grown": 3.5, "new": 1.0}

    def ranks(**options: Any) -> list[int]:
        chosen = ef.policies.accordion(light, heavy, now, **options)
        return [chosen.codec.for_leaf(path, None).rank for path in now]

    assert ranks(previous=before) == [1, 4, 4, 4]
    assert ranks() == ranks(previous=before, rate_fell=True) == [4, 4, 4, 4]
    assert ranks(previous=before, threshold=0.8) == [1, 1, 1, 4]


def test_a_new_choice_goes_on_with_the_memory() -> None:
    """The residual is like the parameters, so another compressor takes it as it is."""
    rule = lambda compressor: ef.error_feedback(compressor)  # noqa: E731
    first = rule(ef.top_k(k=1))
    _, state = jax.jit(first.update)(GRADS, first.init(GRADS))
    second = rule(ef.policies.within_bytes(GRADS, LEVELS, 120))
    state = second.init(GRADS)._replace(residual=state.residual)
    updates, after = jax.jit(second.update)(GRADS, state)
    total = jax.tree.map(np.add, *jax.device_get((updates, after.residual)))
    expected = jax.tree.map(np.add, *jax.device_get((GRADS, state.residual)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, expected)


def test_a_choice_in_the_middle_of_a_run_keeps_the_memories() -> None:
    """The state of a rule has one form for all stateless compressors, chosen by leaf or not."""
    before = ef.error_feedback(ef.top_k(k=1))
    _, state = jax.jit(before.update)(GRADS, before.init(GRADS))
    chosen = ef.policies.within_bytes(state.residual, LEVELS, budget=150)
    after = ef.error_feedback(chosen)
    assert jax.tree.structure(after.init(GRADS)) == jax.tree.structure(state)
    updates, later = jax.jit(after.update)(GRADS, state)
    assert jax.tree.structure(later) == jax.tree.structure(state)
    owed = jax.tree.map(np.add, *jax.device_get((GRADS, state.residual)))
    jax.tree.map(
        lambda x, sent, rest: np.testing.assert_allclose(sent + rest, x, atol=1e-6),
        owed,
        *jax.device_get((updates, later.residual)),
    )
