"""EF21 if only a few workers have each feature: theory then allows far longer steps.

```
python -m experiments.rare_features
python -m experiments.rare_features --flagfile=experiments/presets/rare_features_published.flags
python -m experiments.rare_features --datasets=mushrooms,a9a --data_dir=DIR
```

The question of Richtarik, Gasanov and Burlachenko, "Error Feedback Shines when Features are Rare"
(2023), with the data of its public code: least squares, f_i(x) = ||A_i x - b_i||^2/m, in which
every feature occurs on c of the n workers, drawn at random, so A_i has columns of zeros; singular
values between 0.9 and 4.0, and one larger for worker 0; b_i = A_i (1/2, ..., 1/2) + noise.

If a worker's estimate starts at zero on the features that it does not have, it stays there. So the
errors of different workers overlap little, and the step may be

    1/(L + L_+ sqrt(c/n) xi)     instead of     1/(L + L_QM xi),      xi about 2 d for top-1,

with mean_i ||grad f_i(x) - grad f_i(y)||^2 <= L_+^2 ||x - y||^2. If only the L_i are known, L_+ is
at most min{L_QM, sqrt(c/n) max L_i}; for least squares it can be computed. The algorithm is EF21
with top-1 in all cases; only the step differs. With --datasets the problem is logistic regression
without a regulariser on LibSVM files, split into --workers parts in the order of the file.

Result (2 CPU cores, half a minute): with c/n = 0.05 the step is 17 times as long, and after 20,000
rounds f - f* relative to the start is 2e-8 instead of 0.1. With c/n = 0.9 the step is 5% longer,
with the exact L_+ 94%.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from ef_optax import theory
from experiments import libsvm, logistic, study

STUDY = study.Study("rare_features", __doc__)
FLAGS = STUDY.flags
logistic.define_data_dir(FLAGS)
flags.DEFINE_list(
    "shares", ["0.05", "0.5", "0.9"], "c/n, of the synthetic data.", flag_values=FLAGS
)
flags.DEFINE_list("datasets", [], "LibSVM files, instead of the synthetic data.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 20, "Workers n.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("dimension", 50, "Features d.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 20_000, "Rounds to run.", lower_bound=10, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the data.", flag_values=FLAGS)

AXIS = "workers"
ROWS = 12  # of each worker
POINTS = 1000  # of a curve
STEEP, FLAT = 20.0, 1.0  # squared singular values lie between these, before the factor 0.9
# If the last two coincide, one line is wide and the other dashed.
METHODS = {
    "QM": ("EF21's step, quadratic mean", study.VERMILION, (0, (3, 1.5)), 1.8),
    "rare": ("rare features, $L_+$ bounded by the $L_i$", study.BLUE, "-", 3.2),
    "exact": ("rare features, exact $L_+$", study.SKY, (0, (5, 1.5, 1, 1.5)), 1.8),
}
EF21 = ef.ef21(ef.top_k(k=1), axis_name=AXIS)


class Problem(NamedTuple):
    """The objective, and the constants that theory needs."""

    gradients: Callable[[jax.Array, Any], jax.Array]  # of every f_i at x, (n, d)
    measure: Callable[[jax.Array, Any], jax.Array]  # falls to zero at the minimum
    data: Any
    constants: theory.Smoothness
    shared_by: int  # c
    dimension: int


########################################################################################
# Synthetic data
########################################################################################


class LeastSquares(NamedTuple):
    """Arrays of the synthetic problem."""

    a: Any  # (n, m, d)
    b: Any  # (n, m)
    minimum: Any  # (d,)


def owners(share: float, workers: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    """Which worker has which feature, (n, d): every feature is on ceil(share n) workers.

    Draws again until every worker has a feature, because a worker without one has no objective.
    """
    count = int(np.ceil(np.round(share * workers, 9)))
    for _ in range(10_000):
        found = rng.permuted(np.arange(workers)[:, None] < np.full(dimension, count), axis=0)
        if found.any(1).all():
            return found
    raise flags.Error(
        f"--shares={share:g}: {dimension} features on {count} of {workers} workers each leave "
        "some worker without any; take more features or a larger share"
    )


def synthetic(share: float, workers: int, dimension: int, seed: int) -> Problem:
    """The least-squares problem of the public code."""
    rng = np.random.default_rng(seed)
    a = np.zeros((workers, ROWS, dimension))
    for i, own in enumerate(owners(share, workers, dimension, rng)):
        features = int(own.sum())
        left, _, right = np.linalg.svd(rng.random((ROWS, features)), full_matrices=False)
        place = np.arange(min(ROWS, features)) / max(1, features - 1)
        values = 0.9 * np.sqrt((STEEP - FLAT) * place + FLAT) + (1.0 if i == 0 else 0.0)
        a[i][:, own] = (left * values) @ right if features > 1 else left * np.sqrt(STEEP) @ right
    b = a @ np.full(dimension, 0.5) + 2 * rng.uniform(-1, 1, (workers, ROWS))
    a, b = a * np.sqrt(ROWS / 2), b * np.sqrt(ROWS / 2)
    minimum = np.linalg.lstsq(a.reshape(-1, dimension), b.reshape(-1), rcond=None)[0]
    constants = theory.least_squares(list(a), scale=2)
    shared_by = theory.rare_feature_count(list(a))
    data = LeastSquares(a, b, minimum)
    return Problem(residual_gradients, suboptimality, data, constants, shared_by, dimension)


def residual_gradients(x: jax.Array, data: LeastSquares) -> jax.Array:
    """Gradient of every f_i, (n, d)."""
    return 2 / ROWS * jnp.einsum("nmd,nm->nd", data.a, data.a @ x - data.b)


def suboptimality(x: jax.Array, data: LeastSquares) -> jax.Array:
    """f(x) - f*, without the difference of two nearly equal numbers."""
    return jnp.mean(jnp.sum((data.a @ (x - data.minimum)) ** 2, -1)) / ROWS


########################################################################################
# LibSVM files
########################################################################################


def real(name: str, workers: int) -> Problem:
    """Logistic regression on a LibSVM file."""
    features, labels = logistic.load(name, FLAGS.data_dir)
    parts = libsvm.split(features, labels, workers)
    own = [a for a, _ in parts]
    constants, shared_by = theory.logistic_regression(own), theory.rare_feature_count(own)
    data = logistic.rows_of(parts)
    dimension = features.shape[1]
    return Problem(logistic.gradients, gradient_norm, data, constants, shared_by, dimension)


def gradient_norm(x: jax.Array, data: logistic.Rows) -> jax.Array:
    """||grad f(x)||^2; the minimum may lie at infinity, so f* is not known."""
    return jnp.sum(logistic.gradients(x, data).mean(0) ** 2)


########################################################################################
# The study
########################################################################################


def steps_of(problem: Problem) -> dict[str, float]:
    """The step of every method."""
    alpha = ef.top_k(k=1).codec.alpha((problem.dimension,))
    assert alpha is not None
    constants, c = problem.constants, problem.shared_by
    bounded = dataclasses.replace(constants, L_plus=None)
    steps = {
        "QM": theory.ef21_step(constants, alpha, mean="QM"),
        "rare": theory.rare_features_step(bounded, alpha, c),
    }
    if constants.L_plus is not None:
        steps["exact"] = theory.rare_features_step(constants, alpha, c)
    return steps


@functools.partial(jax.jit, static_argnames=("gradients", "measure", "workers", "rounds", "every"))
def curves(
    rates: jax.Array,
    data: Any,
    start: jax.Array,
    *,
    gradients: Callable[..., jax.Array],
    measure: Callable[..., jax.Array],
    workers: int,
    rounds: int,
    every: int,
) -> jax.Array:
    """The measure over that at the start, every `every` rounds, for each step size."""

    def one(rate: jax.Array) -> jax.Array:
        tx = optax.chain(EF21, optax.scale_by_learning_rate(rate))
        seen = study.descend(
            ef.simulate(tx, workers, AXIS),
            lambda x, _: gradients(x, data),
            start,
            rounds,
            jax.random.key(0),
            lambda x, _: measure(x, data),
            every=every,
        )
        return seen / seen[0]

    return jax.vmap(one)(rates)


def gains(workers: int, dimension: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """c/n, and the length of the other steps relative to the QM step."""
    counts = np.unique(np.geomspace(1, workers, 20).round().astype(int))
    shares, found = [], []
    for count in counts:
        try:
            steps = steps_of(synthetic(count / workers, workers, dimension, seed))
        except flags.Error:
            continue  # too few features for all workers to own one
        shares.append(count / workers)
        found.append([steps[method] / steps["QM"] for method in METHODS])
    columns = np.array(found).reshape(-1, len(METHODS)).T
    return np.array(shares), dict(zip(METHODS, columns, strict=True))


def run() -> None:
    """Runs all problems with all steps, writes the table and the picture."""
    try:
        shares = [float(word) for word in FLAGS.shares]
    except ValueError as error:
        raise flags.Error(f"--shares: {error}") from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise flags.Error(f"--shares={','.join(FLAGS.shares)}: numbers in (0, 1] are needed")
    if FLAGS.datasets:
        problems = {name: real(name, FLAGS.workers) for name in FLAGS.datasets}
    else:
        given = FLAGS.workers, FLAGS.dimension, FLAGS.seed
        problems = {f"c/n = {share:g}": synthetic(share, *given) for share in shares}
    folder = STUDY.open()

    ####################################################################################
    # Measure
    ####################################################################################
    every = max(1, FLAGS.rounds // POINTS)
    rows, cells, seen = [], [], {}
    for name, problem in problems.items():
        steps = steps_of(problem)
        values = curves(
            np.array(list(steps.values())),
            problem.data,
            np.zeros(problem.dimension),
            gradients=problem.gradients,
            measure=problem.measure,
            workers=FLAGS.workers,
            rounds=FLAGS.rounds,
            every=every,
        )
        seen[name] = dict(zip(steps, np.asarray(values), strict=True))
        gain = {method: step / steps["QM"] for method, step in steps.items()}
        rows += [
            {"problem": name, "method": method, "step": step, "gain": gain[method]}
            | {"end": float(seen[name][method][-1])}
            for method, step in steps.items()
        ]
        constants, c = problem.constants, problem.shared_by
        cells.append([name, f"{c / FLAGS.workers:.3g}", f"{constants.L:.4g}"])
        cells[-1] += [f"{constants.L_QM:.4g}", f"{constants.L_AM:.4g}", f"{constants.L_max:.4g}"]
        cells[-1] += ["-" if constants.L_plus is None else f"{constants.L_plus:.4g}"]
        cells[-1] += [f"{gain[method]:.2f}" for method in list(steps)[1:]]
        cells[-1] += [f"{seen[name][method][-1]:.1e}" for method in steps]
    kinds = [method for method in METHODS if not FLAGS.datasets or method != "exact"]
    head = ["problem", "c/n", "L", "L_QM", "L_AM", "max L_i", "L_+"]
    head += [f"step, {method} to QM" for method in kinds[1:]]
    head += [f"end, {method}" for method in kinds]
    what = "squared gradient norm" if FLAGS.datasets else "f - f*"
    text = (
        "# EF21 where features are rare\n\n"
        + study.markdown(head, cells)
        + f"\n- {FLAGS.workers} workers, top-1, theory steps. end: {what} after {FLAGS.rounds:,} "
        "rounds, over that at the start.\n"
        "- rare: with min{L_QM, sqrt(c/n) max L_i} for L_+. exact: with L_+ itself.\n"
    )

    ####################################################################################
    # Draw
    ####################################################################################
    columns = len(problems) + (not FLAGS.datasets)
    from matplotlib import ticker

    figure, axes = study.panels(1, columns, (3.75 * max(2, columns), 4.4))
    time = every * np.arange(1 + FLAGS.rounds // every)
    for axis, name in zip(axes[0], problems, strict=False):
        for method, y in seen[name].items():
            label, colour, dashes, width = METHODS[method]
            axis.plot(time, y, color=colour, linestyle=dashes, lw=width, label=label)
        lengths = [f"{row['gain']:.3g}" for row in rows if row["problem"] == name][1:]
        title = f"{name}\nsteps {' and '.join(lengths)} times as long"
        axis.set(title=title, xlabel="round", yscale="log", ylim=(1e-12, 3))
    axes[0, 0].set(ylabel=f"{what}, relative")
    if not FLAGS.datasets:
        shared, found = gains(FLAGS.workers, FLAGS.dimension, FLAGS.seed)
        for method, (_, colour, dashes, width) in METHODS.items():
            axes[0, -1].plot(shared, found[method], color=colour, linestyle=dashes, lw=width)
        axes[0, -1].set(title="length of the step,\nquadratic mean = 1", xlabel="c/n")
        axes[0, -1].set(xscale="log", yscale="log")
        for axis in (axes[0, -1].xaxis, axes[0, -1].yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    STUDY.close(folder, rows, text, figure)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
