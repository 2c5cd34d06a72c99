"""The methods that the EF21-W study compares: their rules, their theory's steps, their curves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef_optax as ef
from ef_optax import theory
from experiments import study

AXIS = "workers"
TOLERANCE = 1e-4  # of the squared gradient norm at the start
PRESENT = 0.5  # how likely a worker takes part
TOP_1 = ef.top_k(k=1)
PLAIN = ef.ef21(TOP_1, axis_name=AXIS)  # one object: compiled once for all families
# The last two coincide: one line is wide, the other dashed.
METHODS = {
    "ef21 (QM)": ("EF21, quadratic mean", study.VERMILION, (0, (3, 1.5)), 1.8),
    "cloning": ("EF21, workers cloned", study.GREEN, (0, (5, 1.5, 1, 1.5)), 1.8),
    "ef21 (AM)": ("EF21, arithmetic mean", study.SKY, "-", 4.0),
    "ef21_w": ("EF21-W", study.BLACK, (0, (6, 4)), 1.5),
}

Exact = Callable[[jax.Array, Any], jax.Array]
Sample = Callable[[jax.Array, Any, jax.Array], jax.Array]  # of x, data, key


@functools.partial(jax.jit, static_argnames=("exact", "sample", "rule", "clones", "rounds"))
def curve(
    data: Any,
    start: Any,
    rate: Any,
    key: Any,
    *,
    exact: Exact,
    sample: Sample | None,
    rule: optax.GradientTransformation,
    clones: tuple[tuple[int, ...], tuple[float, ...]],
    rounds: int,
) -> jax.Array:
    """||grad f(x_t)||^2 over that at the start, for t = 0 .. rounds.

    Worker i takes part clones[0][i] times, each time with the objective clones[1][i] f_i.
    """
    counts, scales = clones
    owner = np.repeat(np.arange(len(counts)), counts)
    scale = np.asarray(scales)[owner][:, None]

    def gradient(x: jax.Array, key: jax.Array) -> jax.Array:
        found = exact(x, data) if sample is None else sample(x, data, key)
        return found if len(owner) == len(counts) else scale * found[owner]

    seen = study.descend(
        ef.simulate(optax.chain(rule, optax.scale_by_learning_rate(rate)), len(owner), AXIS),
        gradient,
        start,
        rounds,
        key,
        lambda x, _: jnp.sum(exact(x, data).mean(0) ** 2),
    )
    return seen / seen[0]


def mean_only(constants: theory.Smoothness) -> theory.Smoothness:
    """The same L, and L_i whose quadratic mean is L_AM: for a step with L_AM instead of L_QM."""
    return dataclasses.replace(constants, L_i=(constants.L_AM,) * constants.num_workers)


def plans(
    form: str, constants: theory.Smoothness, dimension: int, seed: int
) -> dict[str, tuple[float, dict[str, Any]]]:
    """The step and the rule of every method of a form."""
    alpha = TOP_1.codec.alpha((dimension,))
    assert alpha is not None
    n, weights = constants.num_workers, theory.weights(constants)
    once = {"clones": ((1,) * n, (1.0,) * n)}
    weighted = ef.ef21_w(TOP_1, weights, axis_name=AXIS)
    if form == "partial":
        present, weighted = (
            ef.ef21_partial_participation(TOP_1, PRESENT, seed, weights=given, axis_name=AXIS)
            for given in (None, weights)
        )
        short, long = (
            theory.ef21_partial_participation_step(given, alpha, PRESENT)
            for given in (constants, mean_only(constants))
        )
        return {
            "ef21 (QM)": (short, once | {"rule": present}),
            "ef21 (AM)": (long, once | {"rule": present}),
            "ef21_w": (long, once | {"rule": weighted}),
        }
    found = {
        "ef21 (QM)": (theory.ef21_step(constants, alpha, mean="QM"), once | {"rule": PLAIN}),
        "ef21 (AM)": (theory.ef21_step(constants, alpha, mean="AM"), once | {"rule": PLAIN}),
        "ef21_w": (theory.ef21_w_step(constants, alpha), once | {"rule": weighted}),
    }
    if form == "exact":
        cloned = theory.cloning(constants)
        step = theory.ef21_step(cloned.constants, alpha, mean="QM")
        clones = {"clones": (cloned.counts, cloned.scales)}
        found["cloning"] = (step, clones | {"rule": PLAIN})
    return {method: found[method] for method in METHODS if method in found}


class Outcome(NamedTuple):
    """One form on one problem."""

    constants: theory.Smoothness
    steps: dict[str, float]
    curves: dict[str, np.ndarray]

    @property
    def gain(self) -> float:
        """How many times as long the step of EF21-W is as that of EF21 (QM)."""
        return self.steps["ef21_w"] / self.steps["ef21 (QM)"]

    @property
    def apart(self) -> float:
        """The largest difference of the curves of EF21 (AM) and EF21-W, which start at 1."""
        return float(abs(self.curves["ef21 (AM)"] - self.curves["ef21_w"]).max())

    @property
    def gained(self) -> float:
        """The largest difference of the curves of EF21 (QM) and EF21-W: 0 where no step gains."""
        return float(abs(self.curves["ef21 (QM)"] - self.curves["ef21_w"]).max())

    @property
    def needed(self) -> dict[str, int | None]:
        """Rounds to the tolerance."""
        return {method: study.first_below(y, TOLERANCE) for method, y in self.curves.items()}


def compare(
    form: str,
    exact: Exact,
    data: Any,
    constants: theory.Smoothness,
    rounds: int,
    seed: int,
    sample: Sample | None = None,
) -> Outcome:
    """Runs every method of a form on a problem, from zero, with exact or sampled gradients."""
    dimension = data[0].shape[-1]
    steps, curves = {}, {}
    for method, (step, plan) in plans(form, constants, dimension, seed).items():
        start, key = np.zeros(dimension), jax.random.key(seed)
        seen = curve(data, start, step, key, exact=exact, sample=sample, rounds=rounds, **plan)
        steps[method], curves[method] = step, np.asarray(seen)
    return Outcome(constants, steps, curves)
