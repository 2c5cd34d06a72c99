"""Logistic regression with a non-convex regulariser: GD, EF14, EF21 and EF21+ on split real data.

```
python -m experiments.ef21_logreg
python -m experiments.ef21_logreg --data_dir=DIR --dataset=mushrooms --multiples=64,128,256,512
```

The study of Richtarik, Sokolov and Fatkhullin, "EF21: A new, simpler, theoretically better, and
practically faster error feedback" (2021), with the set-up of its public code: 20 workers hold
consecutive rows of the file, so they disagree; top-1; exact gradients; start drawn from N(0, I);

    f_i(x) = mean_j log(1 + exp(-b_j <a_j, x>)) + 0.1 sum_k x_k^2/(1 + x_k^2).

Steps are those of EF21's theory (quadratic mean) times powers of two, for GD 1/L. EF14 stalls at a
distance that grows with its step, because the differences between workers never leave its memory;
EF21 learns them and goes on. `--dataset` is breast_cancer, which comes with scikit-learn (here
scaled to [-1, 1]), or a file in LibSVM's format in `--data_dir`, taken as it is.

Result (2 CPU cores, a minute at most): on mushrooms EF21 reaches a squared gradient norm of 1e-5
after 3,130, 1,573, 750 and 424 rounds with 64 to 512 times the theory step, GD after 699 with a
hundred times as many bits in each; EF14 stays above 9e-4, and every doubling of the step raises
that level four times at first, later three times.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from ef_optax import theory
from experiments import libsvm, logistic, study

STUDY = study.Study("ef21_logreg", __doc__)
FLAGS = STUDY.flags
logistic.define_data_dir(FLAGS)
flags.DEFINE_string(
    "dataset", logistic.BUNDLED, "breast_cancer or a file in --data_dir.", flag_values=FLAGS
)
flags.DEFINE_integer("workers", 20, "Workers n.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 4000, "Rounds to run.", lower_bound=10, flag_values=FLAGS)
flags.DEFINE_list(
    "multiples", ["1", "16", "64", "128", "256"], "Of the theory step.", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of the start.", flag_values=FLAGS)

AXIS = "workers"
REGULARISER = 0.1
TOLERANCE = 1e-5  # of the squared gradient norm
METHODS = {
    "gd": ("GD, 1/L", study.BLACK, (0, (6, 2))),
    "ef14": ("EF14", study.VERMILION, (0, (3, 1.5))),
    "ef21": ("EF21", study.BLUE, "-"),
    "ef21_plus": ("EF21+", study.GREEN, (0, (5, 1.5, 1, 1.5))),
}


def optimizer(method: str, rate: Any) -> optax.GradientTransformation:
    """The methods; EF14's memory comes after the rate, that of the others before it."""
    step, top_1 = optax.scale_by_learning_rate(rate), ef.top_k(k=1)
    chains = {
        "gd": (ef.compressed_mean(ef.identity(), axis_name=AXIS), step),
        "ef14": (step, ef.error_feedback(top_1, axis_name=AXIS)),
        "ef21": (ef.ef21(top_1, axis_name=AXIS), step),
        "ef21_plus": (ef.ef21_plus(top_1, axis_name=AXIS), step),
    }
    return optax.chain(*chains[method])


def bits(method: str, dimension: int) -> int:
    """One worker's message, one round; numbers have 64 bits.

    EF21+ is counted as in its paper, where the server keeps all estimates: one bit says which of
    the two candidates was taken.
    """
    codec = (ef.identity() if method == "gd" else ef.top_k(k=1)).codec
    return codec.bits((dimension,), jnp.float64) + (method == "ef21_plus")


@functools.partial(jax.jit, static_argnames=("method", "rounds"))
def curves(method: str, steps: Any, start: Any, rows: Any, rounds: int) -> jax.Array:
    """||grad f(x_t)||^2 for each step size and t = 0 .. rounds - 1."""

    def one(rate: jax.Array) -> jax.Array:
        tx = ef.simulate(optimizer(method, rate), len(rows.counts), AXIS)

        # The norm uses the gradients of the step: computing them is nearly all of the work.
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            x, state = carry
            local = logistic.gradients(x, rows, nonconvex=REGULARISER)
            updates, state = tx.update(local, state, x)
            return (optax.apply_updates(x, updates), state), jnp.sum(local.mean(0) ** 2)

        return jax.lax.scan(step, (start, tx.init(start)), length=rounds)[1]

    return jax.vmap(one)(steps)


def run() -> None:
    """Runs all methods with all steps, writes the table and the picture."""
    try:
        multiples = [float(word) for word in FLAGS.multiples]
    except ValueError as error:
        raise flags.Error(f"--multiples: {error}") from error
    features, labels = logistic.load(FLAGS.dataset, FLAGS.data_dir)
    parts = libsvm.split(features, labels, FLAGS.workers)
    folder = STUDY.open()

    ####################################################################################
    # Measure
    ####################################################################################
    constants = theory.logistic_regression([a for a, _ in parts], nonconvex=REGULARISER)
    dimension = features.shape[1]
    alpha = ef.top_k(k=1).codec.alpha((dimension,))
    assert alpha is not None
    step = theory.ef21_step(constants, alpha, mean="QM")
    start = np.random.default_rng(FLAGS.seed).standard_normal(dimension)
    data = logistic.rows_of(parts)
    given = {method: [step * multiple for multiple in multiples] for method in METHODS}
    given["gd"] = [1 / constants.L]
    seen = {
        method: np.asarray(curves(method, np.array(steps), start, data, FLAGS.rounds))
        for method, steps in given.items()
    }
    tail = max(1, FLAGS.rounds // 4)
    rows = [{key: getattr(constants, key) for key in ("L", "L_QM", "L_AM")}]
    cells = []
    for method in METHODS:
        words = []
        for multiple, values in zip(multiples, seen[method], strict=False):
            needed, plateau = study.first_below(values, TOLERANCE), float(np.median(values[-tail:]))
            rows.append({"method": method, "rounds": needed, "plateau": plateau})
            rows[-1] |= {} if method == "gd" else {"multiple": multiple}
            if not np.isfinite(plateau):
                words.append("lost")
            else:
                words.append(f"({plateau:.1e})" if needed is None else f"{needed:,}")
        if method == "gd":
            words = words * len(multiples)
        cells.append([f"`{method}`", *words, str(bits(method, dimension))])
    head = ["method", *(f"x {multiple:g}" for multiple in multiples), "message (bits)"]
    text = (
        f"# EF21 on {FLAGS.dataset}\n\n"
        + study.markdown(head, cells)
        + f"\n- {len(labels):,} rows, {dimension} features, {FLAGS.workers} workers; L "
        f"{constants.L:.10g}, L_QM {constants.L_QM:.10g}, L_AM {constants.L_AM:.10g}; theory step "
        f"{step:.4g}. GD has the step 1/L everywhere.\n"
        f"- Rounds until the squared gradient norm is {TOLERANCE:g}, of {FLAGS.rounds:,}; in "
        "brackets the median over the last quarter of them, where it never was. lost: not finite.\n"
    )

    ####################################################################################
    # Draw
    ####################################################################################
    figure, axes = study.panels(2, len(multiples), (2 + 2.4 * len(multiples), 7.2), sharey=True)
    time = np.arange(FLAGS.rounds)
    for i, multiple in enumerate(multiples):
        for method, (label, colour, dashes) in METHODS.items():
            values = seen[method][0 if method == "gd" else i]
            look = {"color": colour, "linestyle": dashes, "lw": 1.6, "label": label}
            axes[0, i].plot(1 + time, values, **look)
            axes[1, i].plot((1 + time) * bits(method, dimension), values, **look)
        axes[0, i].set(title=f"{multiple:g} x theory step", xlabel="round")
        axes[1, i].set(xlabel="bits of a worker's messages")
    for axis in axes.flat:
        axis.axhline(TOLERANCE, color="#888888", lw=0.8)
        axis.set(xscale="log", yscale="log", ylim=(TOLERANCE / 10, 10 * seen["gd"].max()))
    for axis in axes[:, 0]:
        axis.set(ylabel="squared gradient norm")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    STUDY.close(folder, rows, text, figure)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
