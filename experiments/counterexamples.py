"""Where compression without memory fails, and what error feedback does there.

```
python -m experiments.counterexamples
```

Examples 1 to 3 are those of Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD
and other Gradient Compression Schemes" (2019), one worker each:

1. one dimension, skewed noise: the expected sign points uphill, so signSGD climbs to the maximum;
2. two dimensions, a kink: all signs are +-(1, -1), so signSGD never leaves the line x1 + x2 = 2;
3. least squares with two data points, one of them a step: again all signs are +-(1, -1).

They are made to break signs, and top-1 passes them. Disagreement between workers breaks top-1:

4. three workers with f_i = <a_i, x>^2 + |x|^2/4: the largest entry of each gradient points the
   wrong way, so the mean of what is sent leads uphill and the iterates grow exponentially (after
   Beznosikov, Horvath, Richtarik, Safaryan, "On Biased Compression for Distributed Learning").

Result (2 CPU cores, half a minute): without memory the signs end at the maximum, at f = 2 eps and
at |x| = 1.5, and top-1 at |x| = 1e8; with error feedback all four problems are solved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from experiments import study

STUDY = study.Study("counterexamples", __doc__)
FLAGS = STUDY.flags
flags.DEFINE_integer("runs", 200, "Runs of example 1.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float(
    "part", 1.0, "Part of the steps to take.", lower_bound=0.001, upper_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of the noise of examples 1 and 3.", flag_values=FLAGS)

AXIS = "workers"
# Solid lines with error feedback, dashed without: the picture also reads in black and white.
METHODS = {
    "sgd": ("SGD", study.BLACK, (0, (6, 2))),
    "sign": ("sign", study.VERMILION, (0, (3, 1.5))),
    "scaled_sign": ("scaled sign", study.PURPLE, (0, (1, 1.2))),
    "ef_sign": ("scaled sign + error feedback", study.BLUE, "-"),
    "top_1": ("top-1", study.ORANGE, (0, (5, 1.5, 1, 1.5))),
    "ef_top_1": ("top-1 + error feedback", study.GREEN, "-"),
}
EPS = (0.25, 0.3, 0.6)  # example 2


def optimizer(
    method: str, rate: optax.ScalarOrSchedule, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """The methods; the memory comes after the rate, as in the paper's Algorithm 1."""
    step = optax.scale_by_learning_rate(rate)
    chains = {
        "sgd": (ef.compressed_mean(ef.identity(), axis_name=axis_name), step),
        "sign": (ef.compressed_mean(ef.sign(), axis_name=axis_name), step),
        "scaled_sign": (ef.compressed_mean(ef.scaled_sign(), axis_name=axis_name), step),
        "ef_sign": (step, ef.error_feedback(ef.scaled_sign(), axis_name=axis_name)),
        "top_1": (ef.compressed_mean(ef.top_k(k=1), axis_name=axis_name), step),
        "ef_top_1": (step, ef.error_feedback(ef.top_k(k=1), axis_name=axis_name)),
    }
    return optax.chain(*chains[method])


def sign(x: jax.Array) -> jax.Array:
    """The subgradient of |x| that is +1 at zero; with 0 signSGD would escape through the kink."""
    return jnp.where(x >= 0, 1.0, -1.0)


def iterate(x: jax.Array, _: Any) -> jax.Array:
    """The measurements that most runs need."""
    return x


def noisy_line(method: str, runs: int, steps: int, key: jax.Array) -> jax.Array:
    """Example 1: f(x) = x/4 on [-1, 1], g = 4 with probability 1/4, else -1. All f(x_t)."""
    tx = optimizer(method, 0.01)

    def gradient(x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, 0.25, x.shape), 4.0, -1.0)

    def one(key: jax.Array) -> jax.Array:
        return study.descend(
            tx, gradient, jnp.zeros(1), steps, key, lambda x, _: x[0] / 4, _into_the_interval
        )

    return jax.jit(jax.vmap(one))(jax.random.split(key, runs))


def _into_the_interval(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -1, 1)


def kink(x: Any, eps: Any) -> Any:
    """Example 2: f = eps |x1 + x2| + |x1 - x2| of points (..., 2)."""
    return eps * abs(x[..., 0] + x[..., 1]) + abs(x[..., 0] - x[..., 1])


def kinked(method: str, eps: Any, steps: int) -> tuple[jax.Array, jax.Array]:
    """Example 2 from (1, 1), gamma_t = 0.2/sqrt(t + 1): iterates and residuals for each eps."""
    tx = optimizer(method, lambda t: 0.2 / jnp.sqrt(jnp.asarray(t + 1, float)))

    def one(eps: jax.Array) -> tuple[jax.Array, jax.Array]:
        def gradient(x: jax.Array, _: Any) -> jax.Array:
            along, across = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])
            return eps * sign(x[0] + x[1]) * along + sign(x[0] - x[1]) * across

        def watch(x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
            residual = optax.tree.get(state, "residual")
            return x, jnp.zeros(2) if residual is None else residual

        return study.descend(tx, gradient, jnp.ones(2), steps, jax.random.key(0), watch)

    return jax.jit(jax.vmap(one))(jnp.asarray(eps))


def two_points(method: str, steps: int, key: jax.Array) -> jax.Array:
    """Example 3: f = <a1, x>^2 + <a2, x>^2, a = +-(1, -1) + (1, 1)/2, one of them a step."""
    tx = optimizer(method, 0.02)
    data = jnp.array([[1.5, -0.5], [-0.5, 1.5]])

    def gradient(x: jax.Array, key: jax.Array) -> jax.Array:
        a = data[jax.random.bernoulli(key).astype(int)]
        return 2 * jnp.dot(a, x) * a

    descend: Callable[..., Any] = jax.jit(study.descend, static_argnums=(0, 1, 3, 5))
    return descend(tx, gradient, jnp.ones(2), steps, key, iterate)


def three_workers(method: str, steps: int) -> jax.Array:
    """Example 4: f_i = <a_i, x>^2 + |x|^2/4, the a_i being the shifts of (-3, 2, 2)."""
    tx = ef.simulate(optimizer(method, 0.01, AXIS), 3, AXIS)
    data = jnp.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])

    def gradients(x: jax.Array, _: Any) -> jax.Array:
        return 2 * (data @ x)[:, None] * data + x / 2

    descend: Callable[..., Any] = jax.jit(study.descend, static_argnums=(0, 1, 3, 5))
    return descend(tx, gradients, jnp.ones(3), steps, jax.random.key(0), iterate)


def run() -> None:
    """Runs all methods on all examples, writes the table and the picture."""
    folder = STUDY.open()
    steps = [max(10, int(FLAGS.part * full)) for full in (2000, 5000, 3000, 1000)]
    key = jax.random.key(FLAGS.seed)

    ####################################################################################
    # Measure
    ####################################################################################
    values, points, residuals, distances, spread = {}, {}, {}, {}, {}
    for method in METHODS:
        values[method] = np.asarray(noisy_line(method, FLAGS.runs, steps[0], key)).mean(0)
        iterates, owed = kinked(method, EPS, steps[1])
        points[method], residuals[method] = np.asarray(iterates), np.asarray(owed)
        pairs = np.asarray(two_points(method, steps[2], key))
        distances[method] = np.linalg.norm(pairs, axis=1)
        spread[method] = np.linalg.norm(np.asarray(three_workers(method, steps[3])), axis=1)

    rows, cells = [], []
    for method in METHODS:
        tail = points[method][:, -max(1, steps[1] // 10) :]
        kinks = {eps: kink(x, eps).mean() for eps, x in zip(EPS, tail, strict=True)}
        line = abs(points[method].sum(-1) - 2).max()
        rows += [
            {"method": method, "example": 1, "f": values[method][-1]},
            *({"method": method, "example": 2, "eps": e, "f": f} for e, f in kinks.items()),
            {"method": method, "example": 2, "distance_to_line": line},
            {"method": method, "example": 3, "norm": distances[method][-1]},
            {"method": method, "example": 4, "norm": spread[method][-1]},
        ]
        cells.append([f"`{method}`", f"{values[method][-1]:+.3f}"])
        cells[-1] += [f"{value:.4f}" for value in kinks.values()] + [f"{line:.1g}"]
        cells[-1] += [f"{distances[method][-1]:.1e}", f"{spread[method][-1]:.1e}"]
    head = ["method", "1: f", *(f"2: f, eps {eps}" for eps in EPS)]
    head += ["2: max abs(x1 + x2 - 2)", "3: norm of x", "4: norm of x"]
    text = (
        "# Counter-examples\n\n"
        + study.markdown(head, cells)
        + f"\n- 1: mean of {FLAGS.runs} runs after {steps[0]:,} steps of 0.01; the minimum is "
        "-0.25. In one dimension every method but `sign` is SGD.\n"
        f"- 2: mean of the last tenth of {steps[1]:,} steps of 0.2/sqrt(t + 1); the minimum is 0.\n"
        f"- 3: after {steps[2]:,} steps of 0.02, one data point each; the minimum is at 0.\n"
        f"- 4: three workers, {steps[3]:,} rounds of 0.01; the minimum is at 0.\n"
    )

    ####################################################################################
    # Draw
    ####################################################################################
    figure, axes = study.panels(3, 3, (15, 14))
    at = EPS.index(0.3)

    def draw(axis: Any, method: str, x: Any, y: Any, lw: float = 1.8) -> None:
        label, colour, dashes = METHODS[method]
        axis.plot(x, y, color=colour, linestyle=dashes, lw=lw, label=label)

    axis = axes[0, 0]
    for method in ("ef_sign", "sign"):
        draw(axis, method, np.arange(steps[0] + 1), values[method])
    axis.annotate("sign", (0.4, 0.88), xycoords="axes fraction", color=study.VERMILION)
    axis.annotate(
        "with error feedback: SGD, in one dimension",
        (0.3, 0.16),
        xycoords="axes fraction",
        color=study.BLUE,
    )
    axis.set(title=f"1. Skewed noise: mean of {FLAGS.runs} runs", xlabel="step", ylabel="f(x)")

    axis = axes[0, 1]
    levels(axis, -0.45, 1.45)
    axis.plot([0.55, 1.45], [1.45, 0.55], color=study.VERMILION, lw=0.8, alpha=0.5)
    for method in ("ef_sign", "sign"):
        x = points[method][at]
        _, colour, _ = METHODS[method]
        axis.plot(x[:, 0], x[:, 1], "o-", color=colour, ms=2.5, lw=0.8)
    axis.plot(1, 1, "s", color=study.BLACK, ms=6)
    axis.plot(0, 0, "*", color=study.BLACK, ms=12)
    axis.annotate("start", (1, 1), (1.06, 1.12))
    axis.annotate("minimum", (0, 0), (0.06, -0.14))
    axis.annotate(
        "sign: stays on\n$x_1 + x_2 = 2$", (1.12, 0.88), (0.98, 0.42), color=study.VERMILION
    )
    axis.annotate("error feedback", (0.4, 0.4), (-0.38, 0.62), color=study.BLUE)
    axis.set(title="2. A kink: iterates in the plane, eps = 0.3", xlabel="$x_1$", ylabel="$x_2$")
    axis.set_aspect("equal")

    axis = axes[0, 2]
    window = 26  # the iterates hop over the kink at every step
    for method in METHODS:
        f = kink(points[method][at], 0.3)
        f = np.convolve(f, np.ones(window) / window, "valid") if len(f) > window else f
        draw(axis, method, 1 + np.arange(len(f)), f)
    axis.set(title="2. A kink: f, mean over 26 steps", xlabel="step", ylabel="f(x)")
    axis.set(xscale="log", yscale="log")

    for t, axis in enumerate(axes[1]):
        one_step(axis, t, points["ef_sign"][at], residuals["ef_sign"][at])

    for axis, title, norms, limits, xlabel in (
        (axes[2, 0], "3. Two data points", distances, (1e-20, 1e2), "step"),
        (axes[2, 1], "4. Three workers that disagree", spread, (1e-6, 1e8), "round"),
    ):
        for method in METHODS:
            if norms is spread and method == "sign":
                continue  # once at the minimum, it hops around it by the length of a step
            draw(axis, method, np.arange(len(norms[method])), norms[method])
        axis.set(title=title, xlabel=xlabel, ylabel="distance to the minimum")
        axis.set(yscale="log", ylim=limits)

    axes[2, 2].axis("off")
    methods, arrows = (axes[at].get_legend_handles_labels() for at in ((0, 2), (1, 0)))
    legend = axes[2, 2].legend(*methods, loc="upper center", frameon=False, fontsize=12)
    axes[2, 2].add_artist(legend)
    title = "second row: step t of error feedback"
    axes[2, 2].legend(*arrows, loc="lower center", frameon=False, fontsize=12, title=title)
    STUDY.close(folder, rows, text, figure)


def levels(axis: Any, low: float, high: float) -> None:
    """Lines of equal f of example 2, and the kink."""
    grid = np.linspace(low, high, 200)
    plane = np.stack(np.meshgrid(grid, grid), -1)
    axis.contour(grid, grid, kink(plane, 0.3), 12, colors="#bbbbbb", linewidths=0.8)


def one_step(axis: Any, t: int, x: np.ndarray, residual: np.ndarray) -> None:
    """One step of error feedback: it takes the sign of the residual plus the gradient step.

    Residuals are differences of updates: the virtual iterate x + e moves by the gradient steps.
    """
    ideal = x + residual
    low, high = 0.55, 1.3
    levels(axis, low, high)
    axis.plot([0.7, 1.3], [1.3, 0.7], color=study.VERMILION, lw=0.8, alpha=0.5)
    kinds = (
        ("owed before, $-e_t$", study.ORANGE, "-", x[t], ideal[t]),
        ("gradient step $-\\gamma_t g_t$", study.GREEN, "-", ideal[t], ideal[t + 1]),
        ("sign step taken, $-\\Delta_t$", study.BLUE, "-", x[t], x[t + 1]),
        ("owed after, $-e_{t+1}$", study.ORANGE, "--", x[t + 1], ideal[t + 1]),
    )
    for label, colour, style, start, end in kinds:
        width = 5.0 if colour == study.BLUE else 2.2
        axis.plot([], [], color=colour, lw=width, ls=style, label=label)
        if np.linalg.norm(end - start) < 1e-9:
            continue
        look = {"color": colour, "lw": width, "ls": style, "shrinkA": 0, "shrinkB": 0}
        order = 4 if colour == study.BLUE else 5
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", **look}, zorder=order)
    axis.plot(*x[: t + 1].T, "o", color=study.BLACK, ms=6, zorder=6)
    axis.plot(*x[t + 1], "o", color=study.BLACK, mfc="white", ms=7, zorder=6)
    axis.plot([], [], "o", color=study.BLACK, label="iterates so far")
    for i in range(t + 2):
        place = (-20, -14) if i == 3 else (8, 4)
        axis.annotate(f"$x_{i}$", x[i], place, textcoords="offset points", fontsize=13)
    axis.set(title=f"2. A kink: step t = {t}", xlabel="$x_1$", ylabel="$x_2$")
    axis.set(xlim=(low, high), ylim=(low, high))
    axis.set_aspect("equal")


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
