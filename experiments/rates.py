"""How fast error feedback converges, compared with what theory promises.

```
python -m experiments.rates
```

The objective is smooth and not convex, all its constants are known, and the noise is skewed:
f(x) = sum_j h(x_j) with h(t) = 0.4 (sqrt(1 + t^2) - 1) + 0.3 t^2/(1 + t^2), in 64 dimensions, L = 1
and f* = 0, x_0 = (1, ..., 1); the noise adds to every entry of the gradient 0.9 with probability
1/4 and -0.3 otherwise. Three claims of Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes" (2019), are tested:

- Theorem II: with steps 1/sqrt(T+1) the squared gradient norm falls like 1/sqrt(T), as for SGD, and
  compression adds only a term like 1/(delta^2 T). The picture shows the average over the iterates
  up to T, which is never below the smallest one that the theorem bounds. Without memory it stalls.
- Lemma 3: E||e_t||^2 <= 4 (1 - delta) gamma^2 s2 / delta^2 at every step.
- Remark 5: an unbiased U with E||U(x)||^2 <= k||x||^2, used without memory, multiplies the slow
  term by k; sent as U/k with error feedback, k moves to the fast term.

Result (2 CPU cores, a minute): with top-1, 4 and 16 of 64 entries error feedback ends within 12% of
SGD, far below its bounds; the fitted exponents are -0.49 (SGD), -0.49 to -0.67 (error feedback) and
+0.02 (top-4 without memory). U/16 with error feedback ends at a fifth of U's level.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from ef_optax import theory
from experiments import study

STUDY = study.Study("rates", __doc__)
FLAGS = STUDY.flags
flags.DEFINE_integer("runs", 16, "Runs per horizon.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "log_steps", 13, "The longest run has 2^this steps.", lower_bound=4, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of noise and random masks.", flag_values=FLAGS)

DIMENSION, NOISE = 64, 0.3
L = 1.0  # |h''| is largest at 0
INITIAL_GAP = DIMENSION * (0.4 * (2**0.5 - 1) + 0.15)
LARGEST_SLOPE = 0.43301  # |h'| at its largest, near 0.9636
SECOND_MOMENT = DIMENSION * (LARGEST_SLOPE**2 + 3 * NOISE**2)


class Method(NamedTuple):
    """How a step is compressed, and where it is drawn."""

    label: str
    colour: str
    dashes: Any
    delta: float | None  # contraction of what error feedback compresses; None without memory
    moment: float  # E||U(x)||^2 <= moment ||x||^2 of what is used without memory


OPEN, DASHED, DOTTED = "-", (0, (6, 2)), (0, (1, 1.2))
METHODS = {
    "sgd": Method("SGD", study.BLACK, DASHED, None, 1),
    "ef_top_16": Method("top-16 + EF, $\\delta$ = 1/4", study.SKY, OPEN, 1 / 4, 1),
    "ef_top_4": Method("top-4 + EF, $\\delta$ = 1/16", study.BLUE, OPEN, 1 / 16, 1),
    "ef_top_1": Method("top-1 + EF, $\\delta$ = 1/64", study.GREEN, OPEN, 1 / 64, 1),
    "top_4": Method("top-4, no memory", study.VERMILION, DOTTED, None, 1),
    "random_4": Method("U: random-4 times 16", study.ORANGE, DOTTED, None, 16),
    "ef_random_4": Method("U/16 + EF, $\\delta$ = 1/16", study.PURPLE, OPEN, 1 / 16, 1),
}
THEOREM_2 = ("sgd", "ef_top_16", "ef_top_4", "ef_top_1", "top_4")
REMARK_5 = ("sgd", "random_4", "ef_random_4")
BELOW = (0.5, -0.14)  # position of the legends, in fractions of the axes


def optimizer(method: str, rate: jax.Array, key: jax.Array) -> optax.GradientTransformation:
    """The methods; the memory comes after the rate, as in the paper's Algorithm 2."""
    step = optax.scale_by_learning_rate(rate)
    plain, memory = ef.compressed_mean, ef.error_feedback
    if method == "sgd":
        return step
    kind, kept = method.removeprefix("ef_").split("_")
    if kind == "top":
        compressor = ef.top_k(k=int(kept))
    else:
        compressor = ef.random_k(k=int(kept), key=key, scaled=not method.startswith("ef_"))
    if method.startswith("ef_"):
        return optax.chain(step, memory(compressor))
    return optax.chain(plain(compressor), step)


def gradient(x: jax.Array) -> jax.Array:
    """Gradient of f; far from 0 its square stays above 0.16 per entry, so divergence shows."""
    return 0.4 * x / jnp.sqrt(1 + x**2) + 0.6 * x / (1 + x**2) ** 2


def noisy_gradient(x: jax.Array, key: jax.Array) -> jax.Array:
    """The gradient plus skewed noise of mean zero and variance 3 NOISE^2 per entry."""
    rare = jax.random.bernoulli(key, 0.25, x.shape)
    return gradient(x) + jnp.where(rare, 3 * NOISE, -NOISE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(method: str, steps: int, rates: jax.Array, keys: jax.Array) -> Any:
    """Squared norms of gradient and residual at every step: each (rates, steps + 1), run means."""

    def watch(x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        residual = optax.tree.get(state, "residual", jnp.zeros(1))
        return jnp.sum(gradient(x) ** 2), jnp.sum(residual**2)

    def one(rate: jax.Array, key: jax.Array) -> Any:
        noise, mask = jax.random.split(key)
        tx = optimizer(method, rate, mask)
        start = jnp.ones(DIMENSION)
        return study.descend(tx, noisy_gradient, start, steps, noise, watch)

    runs = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, keys)
    return jax.tree.map(lambda values: values.mean(1), runs)


def bound(method: Method, steps: int) -> float:
    """Theorem II after `steps` gradients at step size 1/sqrt(steps), or its form for SGD."""
    if method.delta is None:
        return (2 * INITIAL_GAP + L * method.moment * SECOND_MOMENT) / (2 * steps**0.5)
    return theory.ef14_tuned_bound(method.delta, L, SECOND_MOMENT, INITIAL_GAP, steps)


def run() -> None:
    """Runs all methods at all horizons, writes the table and the picture."""
    folder = STUDY.open()
    horizons = [2**i for i in range(max(4, FLAGS.log_steps - 7), FLAGS.log_steps + 1)]
    rates = np.array(horizons) ** -0.5
    keys = jax.random.split(jax.random.key(FLAGS.seed), FLAGS.runs)

    ####################################################################################
    # Measure
    ####################################################################################
    averages, residuals, rows, cells = {}, {}, [], []
    for name, method in METHODS.items():
        norms, owed = map(np.asarray, measure(name, horizons[-1], jnp.asarray(rates), keys))
        averages[name] = [row[:steps].mean() for row, steps in zip(norms, horizons, strict=True)]
        residuals[name] = owed[-1] / rates[-1] ** 2
        half = len(horizons) // 2
        slope = np.polyfit(np.log(horizons[half:]), np.log(averages[name][half:]), 1)[0]
        worst = max(
            row[:steps].max() / rate**2
            for row, steps, rate in zip(owed, horizons, rates, strict=True)
        )
        allowed = 0.0
        if method.delta is not None:
            allowed = theory.ef14_residual_bound(method.delta, 1.0, SECOND_MOMENT)
        promised = [bound(method, steps) for steps in horizons]
        valid = name != "top_4"  # no bound holds for a biased compressor without memory
        for steps, value, limit in zip(horizons, averages[name], promised, strict=True):
            rows.append({"method": name, "steps": steps, "gradient": value})
            rows[-1] |= {"bound": limit} if valid else {}
        rows.append({"method": name, "exponent": slope, "residual": worst, "lemma_3": allowed})
        cells.append([f"`{name}`", f"{averages[name][-1]:.3f}"])
        cells[-1] += [f"{promised[-1]:.3g}" if valid else "none", f"{slope:.2f}"]
        cells[-1] += [f"{worst:.3g}", f"{allowed:.3g}"] if method.delta else ["", ""]
    head = ["method", f"mean gradient norm², T = {horizons[-1]:,}", "bound", "exponent in T"]
    head += ["largest residual norm² / step²", "Lemma 3"]
    text = (
        "# Rates\n\n"
        + study.markdown(head, cells)
        + f"\n- Means of {FLAGS.runs} runs at each of T = {', '.join(map(str, horizons))}, step "
        f"1/sqrt(T); the exponent is fitted to the {len(horizons) - half} longest.\n"
        f"- L = {L:g}, f(x_0) - f* = {INITIAL_GAP:g}, second moment of the gradient at most "
        f"{SECOND_MOMENT:.2f}.\n"
    )

    ####################################################################################
    # Draw
    ####################################################################################
    figure, axes = study.panels(1, 3, (15, 6))
    for axis, names, title in (
        (axes[0, 0], THEOREM_2, "Theorem II (thin: its bounds)"),
        (axes[0, 1], REMARK_5, "Remark 5 (thin: bounds)"),
    ):
        for name in (name for name in names if name in averages):
            method = METHODS[name]
            style: dict[str, Any] = {"color": method.colour, "linestyle": method.dashes}
            axis.plot(horizons, averages[name], "o", ms=4, lw=2, label=method.label, **style)
            if name != "top_4":
                promised = [bound(method, steps) for steps in horizons]
                axis.plot(horizons, promised, lw=0.8, alpha=0.8, **style)
        axis.set(title=title, xlabel="number of steps T, step size $1/\\sqrt{T}$")
        axis.set(xscale="log", yscale="log", ylabel="squared gradient norm, mean over the run")
        axis.set_xticks(horizons[1::2], [str(steps) for steps in horizons[1::2]])
        axis.minorticks_off()
    axis = axes[0, 2]
    for name, method in METHODS.items():
        if method.delta is None:
            continue
        x = np.arange(1, horizons[-1] + 1)
        axis.plot(x, residuals[name][1:], color=method.colour, lw=1.2, label=method.label)
        allowed = theory.ef14_residual_bound(method.delta, 1.0, SECOND_MOMENT)
        lift = 1.12 if name == "ef_random_4" else 1  # its bound is that of top-4
        axis.axhline(allowed * lift, color=method.colour, lw=0.8)
    axis.set(title="Lemma 3 (thin: its bounds)", xlabel="step", xscale="log", yscale="log")
    axis.set(ylabel="squared norm of the residual / step size²")
    for axis in axes.flat:
        axis.legend(fontsize=9, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=BELOW)
    STUDY.close(folder, rows, text, figure)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
