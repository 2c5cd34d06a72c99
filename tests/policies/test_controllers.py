"""Controllers in the program: their decisions against NumPy, on all workers, and their limits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from tests.feedback.rules import side_by_side

N, AXIS, STEPS = 3, "data", 24
SHAPES = {"w": (4, 6), "b": (5,)}
KS = (1, 3, 5)
LEVELS = [
    ef.per_leaf(lambda path, _, k=k: ef.identity() if path.endswith("b") else ef.top_k(k=k))
    for k in KS
]
COSTS = [ef.message_bits(level, {k: jnp.zeros(s) for k, s in SHAPES.items()}) for level in LEVELS]
BYTES = [-(-bits // 8) for bits in COSTS]
BETWEEN = (BYTES[0] + BYTES[1]) // 2

BUDGETS = {"between": (BETWEEN, 1), "windows": (BETWEEN + 7, 3), "middle": (BYTES[1], 1)}
"""A budget and a window."""

TARGETS = {"reached": (0.5, 2, 3), "never": (1.0, 2, 100), "always": (1e-6, 1, 2)}
"""A contraction, a window, and when a level is tried again."""


def feedback(compressor: ef.Compressor) -> Any:
    return ef.error_feedback(compressor, axis_name=AXIS)


def rules() -> dict[str, Any]:
    hold_bytes, hold = ef.policies.hold_bytes, ef.policies.hold_contraction
    bytes_held = {n: hold_bytes(LEVELS, b, window=w) for n, (b, w) in BUDGETS.items()}
    held = {n: hold(LEVELS, a, window=w, retry=r) for n, (a, w, r) in TARGETS.items()}
    fixed = {f"level {i}": LEVELS[i] for i in (1, 2)}
    return {name: feedback(c) for name, c in (bytes_held | held | fixed).items()}


def gradients() -> dict[str, np.ndarray]:
    """Few large values at first, and many later, so that decisions change."""
    rng = np.random.default_rng(1)
    flat = np.linspace(0, 1, STEPS).reshape(-1, 1, 1, 1)
    spikes = rng.standard_t(1.5, size=(STEPS, N, *SHAPES["w"]))
    w = (1 - flat) * spikes + flat * np.sign(spikes)
    return {
        "w": w.astype(np.float32),
        "b": rng.normal(size=(STEPS, N, *SHAPES["b"])).astype(np.float32),
    }


@functools.cache
def outcome() -> tuple[Any, Any]:
    """What is emitted in each step, and the states after it, of all rules in one program."""
    made = rules()
    tx = ef.simulate(side_by_side(made), N, AXIS)
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    init = tx.init(dict.fromkeys(made, zeros))

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(dict.fromkeys(made, g), state, None)
        return state, (updates, state)

    run = jax.jit(lambda g: jax.lax.scan(step, init, g)[1])
    updates, states = run({name: jnp.asarray(g) for name, g in gradients().items()})
    return jax.device_get(updates), jax.device_get(states)


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(x)
    for row, out in zip(x.reshape(N, -1), kept.reshape(N, -1), strict=True):
        order = np.argsort(-np.abs(row), kind="stable")[:k]
        out[order] = row[order]
    return kept


class Bytes:
    """A bucket to which every window adds its budget, and out of which its messages are paid."""

    def __init__(self, budget: int, window: int) -> None:
        self.budget, self.window = budget * window, window
        self.prices = [window * b for b in BYTES]
        self.credit = 0
        self.level = self.paid()

    def paid(self) -> int:
        self.credit = min(self.credit, max(self.prices)) + self.budget
        level = max(j for j, price in enumerate(self.prices) if price <= self.credit)
        self.credit -= self.prices[level]
        return level

    def decide(self, contraction: float) -> int:
        del contraction
        return self.paid()


class Contraction:
    """The level above if a window is not enough, the one below if it may be."""

    def __init__(self, alpha: float, window: int, retry: int) -> None:
        self.alpha, self.window, self.retry = alpha, window, retry
        self.level, self.number = len(LEVELS) - 1, 0
        self.measured: dict[int, tuple[float, int]] = {}

    def decide(self, contraction: float) -> int:
        self.number += 1
        self.measured[self.level] = contraction, self.number
        if contraction < self.alpha:
            return min(self.level + 1, len(LEVELS) - 1)
        below = max(self.level - 1, 0)
        before, when = self.measured.get(below, (1.0, self.number))
        fails = before < self.alpha and self.number - when < self.retry
        return self.level if fails else below


def oracle(controller: Any) -> tuple[np.ndarray, list[int], list[float]]:
    """The levels and the emitted kernel of each step, and the contractions of the windows."""
    own, levels, emitted, windows = gradients(), [], [], []
    e, squares, count = np.zeros((N, *SHAPES["w"])), np.zeros(2), 0
    for w, b in zip(own["w"].astype(np.float64), own["b"].astype(np.float64), strict=True):
        levels.append(controller.level)
        p = w + e
        c = top(p, KS[controller.level])
        e = p - c
        emitted.append(c.mean(0))
        squares += [np.sum(p**2) + np.sum(b**2), np.sum(e**2)]
        count += 1
        if count == controller.window:
            windows.append(1 - squares[1] / squares[0])
            controller.level = controller.decide(windows[-1])
            squares, count = np.zeros(2), 0
    return np.array(emitted), levels, windows


@pytest.mark.parametrize("name", [*BUDGETS, *TARGETS])
def test_decisions_follow_numpy(name: str) -> None:
    updates, states = outcome()
    controller = Bytes(*BUDGETS[name]) if name in BUDGETS else Contraction(*TARGETS[name])
    emitted, levels, windows = oracle(controller)
    found = states[name].exchange.control.level[:-1]  # of the next step; the same on all workers
    assert found.tolist() == levels[1:]
    np.testing.assert_allclose(updates[name]["w"], emitted, rtol=1e-4, atol=1e-5)
    if name == "reached":  # all levels are used, and no decision hangs on rounding
        assert set(levels) == {0, 1, 2}
        assert min(abs(a - TARGETS[name][0]) for a in windows) > 1e-3


@pytest.mark.parametrize(
    ("name", "level", "since"), [("middle", 1, 0), ("never", 2, 0), ("always", 0, 2)]
)
def test_where_nothing_is_decided_it_is_a_fixed_level(name: str, level: int, since: int) -> None:
    """A budget of one level's bytes is that level, and a target never reached is the dearest one.

    A target that is always reached is the cheapest one, after a decision for each level above it.
    """
    updates, states = outcome()
    control = states[name].exchange.control.level
    assert (control[since:] == level).all()
    if not since:
        fixed = updates[f"level {level}"]
        jax.tree.map(np.testing.assert_array_equal, updates[name], fixed)


def test_no_more_is_sent_than_the_budget() -> None:
    _, states = outcome()
    for name in ("between", "windows"):
        budget, window = BUDGETS[name]
        first = Bytes(budget, window).level
        levels = [first, *states[name].exchange.control.level[:-1].tolist()]
        sent = np.cumsum([BYTES[level] for level in levels])
        ends = np.arange(window, STEPS + 1, window)
        assert (sent[ends - 1] <= budget * ends).all()
        assert sent[-1] > budget * STEPS - window * max(BYTES)


def test_large_messages_are_counted_in_larger_units() -> None:
    """Beyond 32 bits, rounded so that no more is sent than the budget."""
    controller = ef.policies.hold_bytes(LEVELS, 5 << 30, window=4).codec.controller
    costs = ((4 << 30) + 1, 9 << 30)
    level, credit = controller.begin(costs)
    levels = []
    for _ in range(50):
        levels.append(int(level))
        level, credit = controller.decide(level, credit, costs, None)
    sent = np.cumsum([costs[level] for level in levels])
    assert (sent <= (5 << 30) * np.arange(1, 51)).all() and 0 < sum(levels) < 50
    least = ef.policies.hold_bytes(LEVELS, costs[0], window=4).codec.controller
    assert int(least.begin(costs[::-1])[0]) == 1  # rounding does not forbid it


def test_credit_has_a_limit() -> None:
    """A budget above all levels' bytes, which would overflow in time."""
    controller = ef.policies.hold_bytes(LEVELS, 99).codec.controller
    level, credit = controller.begin((5, 9))
    for _ in range(3):
        level, credit = controller.decide(level, credit, (5, 9), None)
    assert int(level) == 1 and int(credit) == 99


HOLD = ef.policies.hold_contraction(LEVELS, 0.5)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (ef.policies.hold_bytes(LEVELS, 3), "hold_bytes: budget=3 is too small: the cheapest"),
        (
            ef.policies.hold_contraction(LEVELS[::-1], 0.5),
            "hold_contraction: compressors take .* order them from the cheapest",
        ),
        (ef.per_leaf(lambda *_: HOLD), "leaf 'w' has a controller, but a controller chooses for"),
        (ef.scheduled([1], [ef.top_k(k=1), HOLD]), "leaf 'w' has a controller"),
        (
            ef.policies.hold_bytes([ef.scheduled([1], [ef.top_k(k=1), ef.top_k(k=2)])], 99),
            "a level has Scheduled for the leaf 'b', which changes by itself",
        ),
    ],
    ids=["budget", "order", "per leaf", "scheduled", "level"],
)
def test_what_cannot_be_controlled_is_refused(compressor: ef.Compressor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ef.error_feedback(compressor).init({k: jnp.zeros(s) for k, s in SHAPES.items()})
