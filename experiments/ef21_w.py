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
all workers (EF21-W) brings it down to the arithmetic mean; and then so does a better proof for
EF21 as it is. For a compressor that commutes with scaling, such as top-1, EF21-W *is* EF21, so the
whole gain is the longer step: nothing if all L_i are equal, much if a few are large. How it grows
with L_var = L_QM^2 - L_AM^2 is asked of two families with L_AM = 10 and a prescribed L_var.

Two more forms: with *partial participation* every worker takes part with probability 1/2, and the
step is that of EF21-PP, once with L_QM and once with L_AM in its place (an unverified constant); in
the *stochastic* form a gradient is of one row of the ten, and the steps are those of exact
gradients, because those of the paper could not be compared with it.

With --datasets it is logistic regression, with the same regulariser, on LibSVM files as they are:
--workers consecutive parts, at most one for each row.

Result (2 CPU cores, half a minute): steps 1.04, 2.10 and 8.71 times as long as with the quadratic
mean need 1.04, 2.14 and 8.82 times fewer rounds, and up to 9.3 times fewer as L_var grows; EF21 and
EF21-W agree to rounding; cloning needs up to 1.3 times their rounds, with more messages in each. On
LibSVM files nothing changes but on australian, whose features are unscaled: L_var is 1e16 and the
step 14 times as long.
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

STUDY = study.Study("ef21_w", __doc__)
FLAGS = STUDY.flags
logistic.define_data_dir(FLAGS)
flags.DEFINE_list("datasets", [], "LibSVM files, instead of the synthetic data.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 100, "Workers n.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 32_000, "Rounds to run at most.", lower_bound=10, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of data, constants and draws.", flag_values=FLAGS)

AXIS = "workers"
ROWS = DIMENSION = 10
REGULARISER = 1e-3
TOLERANCE = 1e-4  # of the squared gradient norm at the start
PRESENT = 0.5  # how likely a worker takes part
MEAN = 10.0  # of the L_i whose variance is prescribed
VARIANCES = (0, 10, 30, 100, 300, 1000, 3000, 9000)
TOP_1 = ef.top_k(k=1)
PLAIN = ef.ef21(TOP_1, axis_name=AXIS)  # one object: compiled once for all families

# Name: the prescribed constants of n workers, without the regulariser's share.
FAMILIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "equal": lambda n, _: np.ones(n),
    "uniform in [1, 3]": lambda n, rng: rng.uniform(1, 3, n),
    "exp(2 z), z normal": lambda n, rng: np.exp(2 * rng.standard_normal(n)),
    "one worker 1000, others 1": lambda n, _: np.array([1000.0] + [1.0] * (n - 1)),
}
UNEQUAL = tuple(FAMILIES)[2:]  # where the other forms are tried
# The last two lie on each other: one line wide, the other broken.
METHODS = {
    "ef21 (QM)": ("EF21, quadratic mean", study.VERMILION, (0, (3, 1.5)), 1.8),
    "cloning": ("EF21, workers cloned", study.GREEN, (0, (5, 1.5, 1, 1.5)), 1.8),
    "ef21 (AM)": ("EF21, arithmetic mean", study.SKY, "-", 4.0),
    "ef21_w": ("EF21-W", study.BLACK, (0, (6, 4)), 1.5),
}
FORMS = {"partial": "workers present half the time", "stochastic": "gradients of one row"}
# The marks lie on each other too: one is a ring.
RING = {"marker": "o", "ms": 11, "mfc": "none", "mew": 1.8, "color": study.PURPLE}
SPREADS = {"one steep worker": RING, "log-normal": {"marker": "s", "ms": 5, "color": study.ORANGE}}

########################################################################################
# Problems
########################################################################################


class LeastSquares(NamedTuple):
    """Arrays of the synthetic problem."""

    a: Any  # (n, 10, 10)
    b: Any  # (n, 10)


def family(name: str, workers: int, seed: int) -> LeastSquares:
    """The problem with the constants of this family."""
    rng = np.random.default_rng(seed)
    return problem(FAMILIES[name](workers, rng), rng)


def problem(target: np.ndarray, rng: np.random.Generator) -> LeastSquares:
    """Random A_i with the prescribed largest eigenvalues of 2 A_i^T A_i/10, and b."""
    a = rng.standard_normal((len(target), ROWS, DIMENSION))
    a *= np.sqrt(target * ROWS / 2)[:, None, None] / np.linalg.norm(a, 2, (1, 2), keepdims=True)
    planted = rng.standard_normal(DIMENSION)
    noise = rng.standard_normal((len(target), ROWS))
    return LeastSquares(a, a @ planted + 0.1 * np.sqrt(target)[:, None] * noise)


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


def gradients(x: jax.Array, data: LeastSquares) -> jax.Array:
    """Of every f_i, (n, 10)."""
    of_data = 2 / data.a.shape[1] * jnp.einsum("nrd,nr->nd", data.a, data.a @ x - data.b)
    return of_data + REGULARISER * 2 * x / (1 + x**2) ** 2


def of_one_row(x: jax.Array, data: LeastSquares, key: jax.Array) -> jax.Array:
    """Of every f_i with one of its rows, drawn anew by every worker, in the place of all."""
    own = jnp.arange(len(data.b))
    drawn = jax.random.randint(key, own.shape, 0, ROWS)
    return gradients(x, LeastSquares(data.a[own, drawn][:, None], data.b[own, drawn][:, None]))


def of_logistic(x: jax.Array, data: logistic.Rows) -> jax.Array:
    """Of every f_i of a LibSVM file."""
    return logistic.gradients(x, data, nonconvex=REGULARISER)


########################################################################################
# Methods
########################################################################################

Exact = Callable[[jax.Array, Any], jax.Array]


@functools.partial(jax.jit, static_argnames=("exact", "sample", "rule", "clones", "rounds"))
def curve(
    data: Any,
    start: Any,
    rate: Any,
    key: Any,
    *,
    exact: Exact,
    sample: Callable[..., jax.Array] | None,
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
    """The same L, and L_i whose quadratic mean is L_AM: for a step with L_AM in L_QM's place."""
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
    form: str, exact: Exact, data: Any, constants: theory.Smoothness, rounds: int, seed: int
) -> Outcome:
    """Runs every method of a form on a problem, from zero."""
    dimension = data[0].shape[-1]
    steps, curves = {}, {}
    for method, (step, plan) in plans(form, constants, dimension, seed).items():
        sample = of_one_row if form == "stochastic" else None
        start, key = np.zeros(dimension), jax.random.key(seed)
        seen = curve(data, start, step, key, exact=exact, sample=sample, rounds=rounds, **plan)
        steps[method], curves[method] = step, np.asarray(seen)
    return Outcome(constants, steps, curves)


def constants_of(data: LeastSquares) -> theory.Smoothness:
    """The smoothness constants of a synthetic problem."""
    return theory.least_squares(list(data.a), scale=2, nonconvex=REGULARISER)


@functools.partial(jax.jit, static_argnames=("rounds",))
def rounds_needed(data: LeastSquares, rate: Any, rounds: int) -> jax.Array:
    """Rounds of EF21 until the tolerance, at most this many."""
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


def growth(kind: str, workers: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Step and rounds, QM over AM, for each prescribed variance."""
    rows = []
    for variance in VARIANCES:
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


########################################################################################
# The study
########################################################################################


def run() -> None:
    """Runs all methods on all problems, writes the tables and the picture."""
    if FLAGS.datasets:
        run_on_files()
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
            outcomes[name, form] = compare(form, gradients, data, *given)
    grown = {kind: growth(kind, n, FLAGS.rounds, seed) for kind in SPREADS}

    rows = [row for name, form in outcomes for row in measurements(name, form, outcomes)]
    rows += [row for kind in grown for row in grown[kind]]
    exact = {name: outcome for (name, form), outcome in outcomes.items() if form == "exact"}
    others = [
        [name, form, f"{o.gain:.2f}", *(words(o.needed[m]) for m in o.curves), f"{o.apart:.0e}"]
        for (name, form), o in outcomes.items()
        if form != "exact"
    ]
    head = ["L_i", "form", "step ratio", *(m for m in METHODS if m != "cloning"), "apart"]
    growing = [
        [row["spread"], f"{row['L_var']:,.0f}", f"{row['step gain']:.2f}"]
        + [f"{count:,}" for count in row["rounds"]]
        + [f"{row['gain']:.2f}" if row["gain"] else "-"]
        for kind in grown
        for row in grown[kind]
    ]
    text = (
        "# EF21 and the mean of the smoothness constants\n\n"
        + table_of(exact)
        + notes(n)
        + "\n"
        + study.markdown(head, others)
        + f"\n- partial: every worker takes part with probability {PRESENT:g}. stochastic: "
        "gradients of one row of ten, steps of exact gradients.\n\n"
        + study.markdown(["L_i", "L_var", "step ratio", "rounds, QM", "AM", "ratio"], growing)
        + f"\n- L_AM = {MEAN:g}, exact gradients.\n"
    )

    figure, axes = study.panels(2, 5, (15.5, 7.4))
    for axis, (name, outcome) in zip(axes[0], exact.items(), strict=False):
        draw(axis, name, outcome)
    places = [(name, form) for form in FORMS for name in UNEQUAL]
    for axis, place in zip(axes[1], places, strict=False):
        name, form = place
        draw(axis, f"{FORMS[form]}\n{name}", outcomes[place])
    for row in axes:
        row[0].set(ylabel="squared gradient norm, relative")
    draw_growth(axes[0, 4], grown)
    axes[1, 4].axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 4].legend(handles, labels, loc="center", frameon=False)
    STUDY.close(folder, rows, text, figure)


def run_on_files() -> None:
    """Logistic regression on LibSVM files."""
    loaded = {name: logistic.load(name, FLAGS.data_dir) for name in FLAGS.datasets}
    folder = STUDY.open()
    outcomes = {}
    for name, (features, labels) in loaded.items():
        parts = libsvm.split(features, labels, min(FLAGS.workers, len(labels)))
        constants = theory.logistic_regression([a for a, _ in parts], nonconvex=REGULARISER)
        rows = logistic.rows_of(parts)
        outcomes[name] = compare("exact", of_logistic, rows, constants, FLAGS.rounds, FLAGS.seed)
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
        + notes(FLAGS.workers)
        + f"\nSquared gradient norm after {FLAGS.rounds:,} rounds, over that at the start:\n\n"
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
    STUDY.close(folder, rows, text, figure)


def measurements(name: str, form: str, outcomes: dict[Any, Outcome]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: one for each method, one for the problem."""
    outcome, place = outcomes[name, form], {"problem": name, "form": form}
    rows = [
        place
        | {"method": method, "step": outcome.steps[method]}
        | {"rounds": outcome.needed[method], "end": float(values[-1])}
        for method, values in outcome.curves.items()
    ]
    constants = outcome.constants
    rows.append(place | {"apart": outcome.apart, "gain": outcome.gain, "gained": outcome.gained})
    rows[-1] |= {key: getattr(constants, key) for key in ("L", "L_AM", "L_QM", "L_var")}
    return rows


def words(count: int | None) -> str:
    """A number of rounds, or a dash for more than were run."""
    return "-" if count is None else f"{count:,}"


def table_of(outcomes: dict[str, Outcome]) -> str:
    """The constants and the rounds of the exact form."""
    head = ["L_i", "n", "L_AM", "L_QM", "L_var", "step ratio", *METHODS, "apart"]
    cells = [
        [name, f"{o.constants.num_workers:,}", f"{o.constants.L_AM:.4g}"]
        + [f"{o.constants.L_QM:.4g}", f"{o.constants.L_var:.3g}", f"{o.gain:.2f}"]
        + [words(o.needed[method]) for method in METHODS]
        + [f"{o.apart:.0e}"]
        for name, o in outcomes.items()
    ]
    return study.markdown(head, cells)


def notes(workers: int) -> str:
    """What the columns mean."""
    return (
        f"\n- {workers:,} workers, top-1, theory steps. Rounds until the squared gradient norm is "
        f"{TOLERANCE:g} of the first; - where {FLAGS.rounds:,} rounds were not enough.\n"
        "- step ratio: of EF21-W, and EF21 (AM), to EF21 (QM). apart: largest difference of the "
        "curves of EF21 (AM) and EF21-W, which start at 1.\n"
    )


def draw(axis: Any, name: str, outcome: Outcome) -> None:
    """The curves of one problem, as far as the slowest needs."""
    for method, y in outcome.curves.items():
        label, colour, dashes, width = METHODS[method]
        axis.plot(y, color=colour, linestyle=dashes, lw=width, label=label)
    length = len(outcome.curves["ef21_w"]) - 1
    reached = [count for count in outcome.needed.values() if count]
    most = min(length, 1.1 * max(reached)) if reached else length
    axis.set_title(f"{name}\nstep {outcome.gain:.3g} times as long", fontsize=11)
    axis.set(xlabel="round", yscale="log")
    axis.set(xlim=(0, most), ylim=(TOLERANCE / 3 if reached else TOLERANCE * 10, 2))


def draw_growth(axis: Any, grown: dict[str, list[dict[str, Any]]]) -> None:
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


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
