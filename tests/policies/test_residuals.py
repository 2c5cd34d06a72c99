"""Policies of the residual: against NumPy, what they drop, and where they change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax.extend import Memory
from tests.feedback.rules import side_by_side

N, AXIS, STEPS, SIZE = 3, "data", 6, 12
TOP = ef.top_k(k=2)
EF14 = functools.partial(ef.error_feedback, axis_name=AXIS)
NEAREST = ef.block_quantize(4, block=4)
SCALES = np.array([1.0, 4.0, 2.0, 0.5, 0.5, 8.0])


def late(step: Any) -> Any:
    """A schedule of the step, for NumPy and JAX."""
    return 0.25 + step / 8


def relative(norm: Any) -> Any:
    return 0.25 + norm / 2


POLICIES = ef.policies
TESTED = {
    "largest": lambda: POLICIES.clip_residual(EF14(TOP), 0.5),
    "shared mean": lambda: POLICIES.clip_residual(EF14(TOP), 0.5, across="mean", axis_name=AXIS),
    "shared largest": lambda: POLICIES.clip_residual(
        EF14(TOP), 0.5, by="rms", across="largest", axis_name=AXIS
    ),
    "rms": lambda: POLICIES.clip_residual(EF14(TOP), 0.75, by="rms"),
    "value": lambda: POLICIES.clip_residual(EF14(TOP), 1.0, by="value"),
    "norm": lambda: POLICIES.clip_residual(EF14(TOP), 2.0, by="norm"),
    "stored": lambda: POLICIES.clip_residual(EF14(TOP, memory=NEAREST), 1.0, by="value"),
    "reset": lambda: POLICIES.reset_residual(EF14(TOP), 3),
    "steps": lambda: POLICIES.steer_residual(EF14(TOP), injection=late, retention=late),
    "norms": lambda: POLICIES.steer_residual(EF14(TOP), injection=POLICIES.OfNorm(relative)),
    "dgc": lambda: POLICIES.clip_residual(
        ef.dgc(TOP, momentum=0.5, axis_name=AXIS), 1.0, by="value"
    ),
    "econtrol": lambda: POLICIES.reset_residual(ef.econtrol(TOP, 0.5, axis_name=AXIS), 2),
    "off": lambda: EF14(TOP),
    "high limit": lambda: POLICIES.clip_residual(EF14(TOP), 1e6),
    "late reset": lambda: POLICIES.reset_residual(EF14(TOP), STEPS + 1),
    "neutral": lambda: POLICIES.steer_residual(EF14(TOP)),
    "constant": lambda: POLICIES.steer_residual(EF14(TOP), injection=0.5, retention=0.75),
    "built in": lambda: EF14(TOP, injection=0.5, decay=0.75),
    "corrected": lambda: POLICIES.steer_residual(
        EF14(TOP, learning_rate=ef.power_decay(0.5, 1.0)), injection=0.5
    ),
    "built in, corrected": lambda: EF14(TOP, learning_rate=ef.power_decay(0.5, 1.0), injection=0.5),
    "flush": lambda: EF14(POLICIES.flush(TOP, 3)),
    "partial flush": lambda: EF14(POLICIES.flush(TOP, 2, by=ef.top_k(k=6))),
    "flush of ef21": lambda: ef.ef21(POLICIES.flush(TOP, 3), axis_name=AXIS),
}

GRADS = np.random.default_rng(3).normal(size=(STEPS, N, SIZE)).astype(np.float32)
GRADS *= np.array([1, 2, 0.5, 1, 2, 0.5], np.float32)[:, None, None]  # norms rise and fall


@functools.cache
def results() -> tuple[dict[str, Any], dict[str, Any]]:
    """What every policy emits and its state after every step, from one compiled program."""
    tx = ef.simulate(side_by_side({name: make() for name, make in TESTED.items()}), N, AXIS)
    init = tx.init({name: jnp.zeros(SIZE) for name in TESTED})

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(dict.fromkeys(TESTED, g), state, None)
        return state, (updates, state)

    return jax.device_get(jax.jit(lambda g: jax.lax.scan(step, init, g)[1])(jnp.asarray(GRADS)))


def top(x: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(x)
    order = np.argsort(-np.abs(x), kind="stable")[:2]
    kept[order] = x[order]
    return kept


def quantised(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, 4)
    unit = np.abs(blocks).max(1, keepdims=True) / 7
    return (np.round(blocks / np.where(unit > 0, unit, 1)) * unit).reshape(x.shape)


Limits = dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]
CLIPS: Limits = {
    "largest": lambda e, g: np.clip(e, -0.5 * np.abs(g).max(), 0.5 * np.abs(g).max()),
    "rms": lambda e, g: np.clip(e, -0.75 * np.sqrt((g**2).mean()), 0.75 * np.sqrt((g**2).mean())),
    "value": lambda e, g: np.clip(e, -1, 1),
    "norm": lambda e, g: e * min(1, 2 / np.linalg.norm(e)),
    "stored": lambda e, g: np.clip(e, -1, 1),
    "dgc": lambda e, g: np.clip(e, -1, 1),
}

SHARED = {
    "shared mean": lambda g: 0.5 * np.abs(g).max(1).mean(),
    "shared largest": lambda g: 0.5 * np.sqrt((g**2).mean(1)).max(),
}
"""The limit of all workers from all of their gradients."""


def oracle(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Emitted, residual and dropped 1-norm of every worker, after each step."""
    e, u, h = np.zeros((3, N, SIZE))
    dropped, emitted, residuals, drops, norms = np.zeros(N), [], [], [], []
    for t, g in enumerate(GRADS.astype(np.float64)):
        a = late(t) if name == "steps" else 1.0
        if name == "norms":
            a = relative(norms[-1] / max(norms) if norms else 1.0)
        if name == "dgc":
            u = 0.5 * u + g
            p = e + u
        elif name == "econtrol":
            p = 0.5 * e + g - h
        else:
            p = g + a * e
        c = np.stack([top(row) for row in p])
        if name == "econtrol":
            e = e + g - h - c
            h = h + c
        elif name == "dgc":
            u, e = np.where(c != 0, 0, u), p - c
        else:
            e = e + g - c
        owed = e
        if name in CLIPS:
            e = np.stack([CLIPS[name](row, own) for row, own in zip(e, g, strict=True)])
        if name in SHARED:
            e = np.clip(e, -SHARED[name](g), SHARED[name](g))
        if name == "steps":
            e = late(t) * e
        if (name == "reset" and t % 3 == 2) or (name == "econtrol" and t % 2 == 1):
            e = np.zeros_like(e)
        dropped = dropped + np.abs(owed - e).sum(1)
        if name == "stored":
            e = np.stack([quantised(row) for row in e])
        out = h.mean(0) if name == "econtrol" else c.mean(0)
        emitted.append(out)
        residuals.append(e)
        drops.append(dropped)
        norms.append(np.linalg.norm(out))
    return np.array(emitted), np.array(residuals), np.array(drops)


@pytest.mark.parametrize(
    "name", [*CLIPS, *SHARED, "reset", "steps", "norms", "econtrol"], ids=lambda name: name
)
def test_every_policy_follows_numpy(name: str) -> None:
    updates, states = results()
    emitted, residual, dropped = oracle(name)
    np.testing.assert_allclose(updates[name], emitted, rtol=1e-4, atol=1e-5)
    found = jax.vmap(Memory.read)(states[name].rule.residual[name])
    np.testing.assert_allclose(found, residual, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states[name].dropped[name], dropped, rtol=1e-4, atol=1e-4)
    assert (dropped[-1] > 0.1).all() == (name != "norms")


@pytest.mark.parametrize("name", ["high limit", "late reset", "neutral"])
def test_a_policy_that_never_acts_changes_no_bit(name: str) -> None:
    updates, states = results()
    np.testing.assert_array_equal(updates[name], updates["off"])
    np.testing.assert_array_equal(states[name].rule.residual[name], states["off"].residual["off"])
    assert not states[name].dropped[name].any()


@pytest.mark.parametrize(
    ("policy", "rule"), [("constant", "built in"), ("corrected", "built in, corrected")]
)
def test_constant_factors_are_those_of_error_feedback(policy: str, rule: str) -> None:
    """With the residual in the units of the last learning rate too."""
    updates, states = results()
    np.testing.assert_allclose(updates[policy], updates[rule], rtol=1e-5, atol=1e-6)
    found, expected = states[policy].rule.residual[policy], states[rule].residual[rule]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["norms", "flush", "partial flush"])
def test_injection_and_flush_lose_nothing(name: str) -> None:
    """The virtual iterate, what was emitted plus the mean residual, moves by the mean gradient."""
    updates, states = results()
    state = states[name]
    residual = state.rule.residual[name] if name == "norms" else state.residual[name]
    moved = np.cumsum(updates[name], 0) + residual.mean(1)
    np.testing.assert_allclose(moved, np.cumsum(GRADS.mean(1), 0), rtol=1e-4, atol=1e-5)


def test_after_a_flush_nothing_is_owed() -> None:
    updates, states = results()
    owed = np.abs(states["flush"].residual["flush"]).sum((1, 2)) > 0
    assert owed.tolist() == [True, True, False] * 2
    np.testing.assert_allclose(updates["flush of ef21"][2], GRADS[2].mean(0), rtol=1e-5, atol=1e-6)
    partial = (states["partial flush"].residual["partial flush"] == 0).sum(2)
    assert (partial[::2] == 2).all() and (partial[1::2] == 6).all()


def test_a_gradient_of_zero_clips_nothing() -> None:
    tx = ef.policies.clip_residual(ef.error_feedback(ef.top_k(k=1)), 1.0)
    update = jax.jit(tx.update)
    _, state = update(jnp.array([3.0, 2.0, 1.0]), tx.init(jnp.zeros(3)))
    _, state = update(jnp.zeros(3), state)
    assert state.rule.residual.tolist() == [0.0, 0.0, 1.0] and float(state.dropped) == 0


def test_a_changing_loss_scale_changes_no_bit() -> None:
    """Scaled by powers of two and scaled back, a run is the one without scaling."""
    tx = ef.simulate(POLICIES.rescale_residual(EF14(TOP)), N, AXIS, extra_args={"loss_scale": 1.0})
    state, update = tx.init(jnp.zeros(SIZE)), jax.jit(tx.update)
    for g, scale, expected in zip(GRADS, SCALES, results()[0]["off"], strict=True):
        scale = np.float32(scale)
        updates, state = update(g * scale, state, None, loss_scale=scale)
        np.testing.assert_array_equal(updates / scale, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: POLICIES.clip_residual(ef.ef21(TOP)), "clip_residual: the state of rule has 0"),
        (lambda: POLICIES.reset_residual(optax.sgd(0.1), 2), "use ef_optax.policies.flush"),
        (lambda: POLICIES.rescale_residual(ef.dgc(TOP)), "also remembers momentum"),
        (
            lambda: POLICIES.steer_residual(ef.local.qsparse_local_sgd(TOP, 0.1, 2)),
            "steer_residual: the state of rule has 0",
        ),
    ],
)
def test_rules_without_a_residual_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().init(jnp.zeros(3))


def test_it_must_be_told_the_loss_scale() -> None:
    tx = POLICIES.rescale_residual(ef.error_feedback(TOP))
    with pytest.raises(ValueError, match="update needs loss_scale="):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
