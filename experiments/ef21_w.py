"""EF21 with the quadratic and with the arithmetic mean of the smoothness constants, and EF21-W.

```
python -m experiments.ef21_w
python -m experiments.ef21_w --flagfile=experiments/presets/ef21_w_libsvm.flags --data_dir=DIR
```

The question of Richtarik, Gasanov and Burlachenko, "Error Feedback Reloaded: From Quadratic to
Arithmetic Mean of Smoothness Constants" (2024), on least squares with prescribed constants L_i:
100 workers, 10 rows and 10 features each, a small non-convex regulariser, top-1, exact gradients,

    f_i(x) = (1/10) ||A_i x - b_i||^2 + 0.001 sum_j x_j^2/(1 + x_j^2),

every method with the largest step its theory allows. The original theory of EF21 has the quadratic
mean of the L_i in its step. Cloning the workers with large L_i (and sending more) or weighting
all workers (EF21-W) replaces it by the arithmetic mean; and so does a better proof for
EF21 itself. For a compressor that commutes with scaling, such as top-1, EF21-W *is* EF21, so the
whole gain is the longer step: nothing if all L_i are equal, much if a few are large. Two families
with L_AM = 10 and a prescribed L_var show how the gain grows with L_var = L_QM^2 - L_AM^2.

Two more forms: with *partial participation* every worker takes part with probability 1/2, and the
step is that of EF21-PP, once with L_QM and once with L_AM instead (an unverified constant); in
the *stochastic* form each gradient uses one row of the ten, and the steps are those of exact
gradients, because we could not compare the paper's own steps with it.

With --datasets the problem is logistic regression, with the same regulariser, on LibSVM files as
they are, in --workers consecutive parts, at most one for each row.

Result (2 CPU cores, half a minute): steps 1.04, 2.10 and 8.71 times as long as with the quadratic
mean need 1.04, 2.14 and 8.82 times fewer rounds, and up to 9.3 times fewer as L_var grows; EF21 and
EF21-W agree to rounding; cloning needs up to 1.3 times their rounds, with more messages in each. Of
the LibSVM files only australian gains, because its features are unscaled: L_var is 1e16 and the
step 14 times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments import ef21_w_files, ef21_w_growth, logistic, study
from experiments.ef21_w_growth import SPREADS, growth
from experiments.ef21_w_methods import METHODS, PRESENT, Outcome, compare
from experiments.ef21_w_problem import LeastSquares, constants_of, gradients, of_one_row, problem
from experiments.ef21_w_report import draw, measurements, notes, table_of, words

STUDY = study.Study("ef21_w", __doc__)
FLAGS = STUDY.flags
logistic.define_data_dir(FLAGS)
flags.DEFINE_list("datasets", [], "LibSVM files, instead of the synthetic data.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 100, "Workers n.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 32_000, "Rounds to run at most.", lower_bound=10, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of data, constants and draws.", flag_values=FLAGS)

Outcomes = dict[tuple[str, str], Outcome]  # by family and form
Grown = dict[str, list[dict[str, Any]]]  # by how the constants are spread, by variance

VARIANCES = (0, 10, 30, 100, 300, 1000, 3000, 9000)

# Name: the prescribed constants of n workers, without the regulariser's share.
FAMILIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "equal": lambda n, _: np.ones(n),
    "uniform in [1, 3]": lambda n, rng: rng.uniform(1, 3, n),
    "exp(2 z), z normal": lambda n, rng: np.exp(2 * rng.standard_normal(n)),
    "one worker 1000, others 1": lambda n, _: np.array([1000.0] + [1.0] * (n - 1)),
}
UNEQUAL = tuple(FAMILIES)[2:]  # the families for the other forms
FORMS = {"partial": "workers present half the time", "stochastic": "gradients of one row"}


def family(name: str, workers: int, seed: int) -> LeastSquares:
    """The problem with the constants of this family."""
    rng = np.random.default_rng(seed)
    return problem(FAMILIES[name](workers, rng), rng)


def run() -> None:
    """Runs all methods on all problems, writes the tables and the picture."""
    if FLAGS.datasets:
        ef21_w_files.run(STUDY)
    else:
        run_on_families()


def run_on_families() -> None:
    """The synthetic problems."""
    folder = STUDY.open()
    outcomes, n, seed = {}, FLAGS.workers, FLAGS.seed
    for name in FAMILIES:
        data = family(name, n, seed)
        for form in ("exact", *FORMS) if name in UNEQUAL else ("exact",):
            given = constants_of(data), FLAGS.rounds, seed
            sample = of_one_row if form == "stochastic" else None
            outcomes[name, form] = compare(form, gradients, data, *given, sample)
    grown = {kind: growth(kind, VARIANCES, n, FLAGS.rounds, seed) for kind in SPREADS}
    rows = [row for name, form in outcomes for row in measurements(name, form, outcomes)]
    rows += [row for kind in grown for row in grown[kind]]
    STUDY.close(folder, rows, text_of(outcomes, grown), picture_of(outcomes, grown))


def exact_of(outcomes: Outcomes) -> dict[str, Outcome]:
    """The outcomes of the exact form."""
    return {name: outcome for (name, form), outcome in outcomes.items() if form == "exact"}


def text_of(outcomes: Outcomes, grown: Grown) -> str:
    """The three tables: the exact form, the other forms, the prescribed variances."""
    others = [
        [name, form, f"{o.gain:.2f}", *(words(o.needed[m]) for m in o.curves), f"{o.apart:.0e}"]
        for (name, form), o in outcomes.items()
        if form != "exact"
    ]
    head = ["L_i", "form", "step ratio", *(m for m in METHODS if m != "cloning"), "apart"]
    return (
        "# EF21 and the mean of the smoothness constants\n\n"
        + table_of(exact_of(outcomes))
        + notes(FLAGS.workers, FLAGS.rounds)
        + "\n"
        + study.markdown(head, others)
        + f"\n- partial: every worker takes part with probability {PRESENT:g}. stochastic: "
        "gradients of one row of ten, steps of exact gradients.\n\n" + ef21_w_growth.table_of(grown)
    )


def picture_of(outcomes: Outcomes, grown: Grown) -> Any:
    """The exact form above, the others below, the prescribed variances in the corner."""
    figure, axes = study.panels(2, 5, (15.5, 7.4))
    for axis, (name, outcome) in zip(axes[0], exact_of(outcomes).items(), strict=False):
        draw(axis, name, outcome)
    places = [(name, form) for form in FORMS for name in UNEQUAL]
    for axis, place in zip(axes[1], places, strict=False):
        name, form = place
        draw(axis, f"{FORMS[form]}\n{name}", outcomes[place])
    for row in axes:
        row[0].set(ylabel="squared gradient norm, relative")
    ef21_w_growth.draw(axes[0, 4], grown)
    axes[1, 4].axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 4].legend(handles, labels, loc="center", frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
