"""How EF21-W's gain grows with the variance of the smoothness constants at a fixed mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef_optax as ef
from experiments import study
from experiments.ef21_w_methods import AXIS, PLAIN, TOLERANCE, plans
from experiments.ef21_w_problem import DIMENSION, LeastSquares, constants_of, gradients, problem

MEAN = 10.0  # of the L_i whose variance is prescribed
# The marks coincide too, so one is a ring.
RING = {"marker": "o", "ms": 11, "mfc": "none", "mew": 1.8, "color": study.PURPLE}
SPREADS = {"one steep worker": RING, "log-normal": {"marker": "s", "ms": 5, "color": study.ORANGE}}


def spread(kind: str, variance: float, workers: int, rng: np.random.Generator) -> np.ndarray:
    """Constants with the mean MEAN and this variance: one is large, or a log-normal sample."""
    if kind == "one steep worker":
        distance = np.sqrt(variance / (workers - 1))
        return np.array([MEAN + (workers - 1) * distance] + [MEAN - distance] * (workers - 1))
    z = rng.standard_normal(workers)

    def scaled(width: float) -> np.ndarray:
        grown = np.exp(width * (z - z.max()))
        return MEAN * grown / grown.mean()

    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).var() < variance else (low, middle)
    return scaled(high) if variance else scaled(0.0)


@functools.partial(jax.jit, static_argnames=("rounds",))
def rounds_needed(data: LeastSquares, rate: Any, rounds: int) -> jax.Array:
    """Rounds of EF21 until the tolerance, up to a limit."""
    chain = optax.chain(PLAIN, optax.scale_by_learning_rate(rate))
    tx = ef.simulate(chain, len(data.b), AXIS)

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sum(gradients(x, data).mean(0) ** 2)

    start = jnp.zeros(DIMENSION)
    first = norm(start)

    def step(carry: Any) -> Any:
        x, state, t = carry
        updates, state = tx.update(gradients(x, data), state, x)
        return optax.apply_updates(x, updates), state, t + 1

    def far(carry: Any) -> jax.Array:
        return (norm(carry[0]) > TOLERANCE * first) & (carry[2] < rounds)

    return jax.lax.while_loop(far, step, (start, tx.init(start), 0))[2]


def growth(
    kind: str, variances: Sequence[float], workers: int, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """Step and rounds, QM over AM, for each prescribed variance."""
    rows = []
    for variance in variances:
        if variance >= MEAN**2 * (workers - 1):
            continue  # no n positive numbers with this mean have this variance
        rng = np.random.default_rng(seed)
        data = problem(spread(kind, variance, workers, rng), rng)
        constants = constants_of(data)
        steps = {
            method: step
            for method, (step, _) in plans("stochastic", constants, DIMENSION, seed).items()
        }
        slow, fast = (
            int(rounds_needed(data, steps[method], rounds)) for method in ("ef21 (QM)", "ef21_w")
        )
        row = {"spread": kind, "L_var": constants.L_var, "rounds": [slow, fast]}
        row["step gain"] = steps["ef21_w"] / steps["ef21 (QM)"]
        rows.append(row | {"gain": slow / fast if slow < rounds else None})
    return rows


def table_of(grown: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each prescribed variance."""
    cells = [
        [row["spread"], f"{row['L_var']:,.0f}", f"{row['step gain']:.2f}"]
        + [f"{count:,}" for count in row["rounds"]]
        + [f"{row['gain']:.2f}" if row["gain"] else "-"]
        for kind in grown
        for row in grown[kind]
    ]
    head = ["L_i", "L_var", "step ratio", "rounds, QM", "AM", "ratio"]
    return study.markdown(head, cells) + f"\n- L_AM = {MEAN:g}, exact gradients.\n"


def draw(axis: Any, grown: dict[str, list[dict[str, Any]]]) -> None:
    """Gain in rounds, and the gain in the step as a line, against L_var."""
    for kind, look in SPREADS.items():
        known = [row for row in grown[kind] if row["gain"]]
        x, y = [row["L_var"] for row in known], [row["gain"] for row in known]
        axis.plot(x, y, ls="", label=f"rounds, {kind}", **look)
    line = [(row["L_var"], row["step gain"]) for row in grown["one steep worker"]]
    axis.plot(*zip(*line, strict=True), color="#666666", lw=1.2, label="length of the step")
    axis.set_title(f"gain over the quadratic mean,\n$L_{{AM}}$ = {MEAN:g}", fontsize=11)
    axis.set(xlabel="$L_{var}$")
    axis.set_xscale("symlog", linthresh=10)
    axis.set(yscale="log", yticks=[1, 2, 5, 10], yticklabels=["1", "2", "5", "10"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=9)
