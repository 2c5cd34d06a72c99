"""EF21 and EF21-W on LibSVM files: logistic regression with data as they are."""

from __future__ import annotations

import jax

from ef_optax import theory
from experiments import libsvm, logistic, study
from experiments.ef21_w_methods import METHODS, compare
from experiments.ef21_w_problem import REGULARISER
from experiments.ef21_w_report import draw, measurements, notes, table_of


def of_logistic(x: jax.Array, data: logistic.Rows) -> jax.Array:
    """Of every f_i of a LibSVM file."""
    return logistic.gradients(x, data, nonconvex=REGULARISER)


def run(frame: study.Study) -> None:
    """Runs all methods on all files that the flags name, writes the tables and the picture."""
    options = frame.flags
    loaded = {name: logistic.load(name, options.data_dir) for name in options.datasets}
    folder = frame.open()
    outcomes = {}
    for name, (features, labels) in loaded.items():
        parts = libsvm.split(features, labels, min(options.workers, len(labels)))
        constants = theory.logistic_regression([a for a, _ in parts], nonconvex=REGULARISER)
        rows = logistic.rows_of(parts)
        outcomes[name] = compare(
            "exact", of_logistic, rows, constants, options.rounds, options.seed
        )
    keyed = {(name, "exact"): outcome for name, outcome in outcomes.items()}
    rows = [row for name, form in keyed for row in measurements(name, form, keyed)]
    ends = [
        [name, *(f"{outcome.curves[method][-1]:.2e}" for method in METHODS)]
        + [f"{outcome.gained:.1e}"]
        for name, outcome in outcomes.items()
    ]
    text = (
        "# EF21 and the mean of the smoothness constants, on LibSVM files\n\n"
        + table_of(outcomes)
        + notes(options.workers, options.rounds)
        + f"\nSquared gradient norm after {options.rounds:,} rounds, over that at the start:\n\n"
        + study.markdown(["file", *METHODS, "QM from W"], ends)
        + "\n- QM from W: the largest difference of their curves; near 0 where the step ratio is "
        "near 1.\n"
    )
    columns = min(3, len(outcomes))
    lines = -(-len(outcomes) // columns)
    figure, axes = study.panels(lines, columns, (4.6 * max(2, columns), 0.6 + 3.7 * lines))
    for axis, (name, outcome) in zip(axes.flat, outcomes.items(), strict=False):
        draw(axis, f"{name}, n = {outcome.constants.num_workers:,}", outcome)
    for axis in axes.flat[len(outcomes) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set(ylabel="squared gradient norm, relative")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    frame.close(folder, rows, text, figure)
