"""One problem, a dial of how much the workers disagree, and ten ways of sending their gradients.

```
python -m experiments.heterogeneity
python -m experiments.heterogeneity --data_dir=DIR --dataset=mushrooms
python -m experiments.heterogeneity --methods='ef21, ef21(block_top_k(0.1)), diana(natural(0), 0.5)'
```

Logistic regression with (l2/2)||x||^2, exact gradients. The dial is the share of every worker's
rows that comes from data sorted by label: at 0 the rows are dealt at random, at 1 most workers hold
one label only. Every method takes its theory step times the power of two that needs
the fewest rounds, because some theories are more cautious than others:

- GD sends all; *top-1, no memory* and EF14 have no theory for a constant step here, so theirs
  are multiples of GD's 1/L and of EF21's;
- EF21, EControl (strength 1/d, which is of the order of alpha; dense first message), CLAG and v2 of
  the three-point compressors (EF21 that skips messages with little news; random-1 of the drift
  before top-1);
- DIANA and MARINA use unbiased random-1 (MARINA sends everything with probability 1/d),
  EF-BV one of the d/2 largest entries at random.

`--methods` also takes expressions of rules in gradient units (`ef.parse`); their step is a multiple
of 1/L.

Traffic to the server is counted in bits of one worker's messages, with numbers of 64 bits: by the
codec for an ordinary round (*message*), and as the papers count it (*information*)
if rounds differ: the dense rounds of MARINA, the first of EControl, the skipped ones of CLAG.

Result (2 CPU cores, two minutes): from dial 0 to dial 1 EF21 needs 4.8 to 7.7 kilobits per worker,
the other methods that learn how the workers differ 16 to 83, GD 236; EF14 with a
constant step and top-1 without memory stall before the tolerance, at a higher level the more the
workers disagree.
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
from experiments import libsvm, logistic, study
from experiments.heterogeneity_methods import AXIS, METHODS, information, message_bits, parse

STUDY = study.Study("heterogeneity", __doc__)
FLAGS = STUDY.flags
logistic.define_data_dir(FLAGS)
flags.DEFINE_string(
    "dataset", logistic.BUNDLED, "breast_cancer or a file in --data_dir.", flag_values=FLAGS
)
flags.DEFINE_string(
    "methods",
    ", ".join(METHODS),
    "Short names, and rules as expressions: 'ef21, ef21(block_top_k(0.1))'.",
    flag_values=FLAGS,
)
flags.DEFINE_list("dials", ["0", "0.5", "1"], "Shares of sorted rows.", flag_values=FLAGS)
flags.DEFINE_integer("workers", 20, "Workers n.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5000, "Rounds to run.", lower_bound=10, flag_values=FLAGS)
flags.DEFINE_integer("runs", 3, "Runs of a random method.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the order of the rows and of draws.", flag_values=FLAGS)

REGULARISER = 0.01
TOLERANCE = 1e-6  # of the squared gradient norm at the start
MULTIPLES = 2.0 ** np.arange(15)


@functools.partial(jax.jit, static_argnames=("method", "rounds"))
def curves(method: str, rates: Any, keys: Any, rows: Any, rounds: int) -> tuple[Any, Any]:
    """Squared gradient norm before every round, bits sent before it: each (rates, runs, rounds)."""
    dimension = rows.signed.shape[-1]

    def one(rate: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chain = optax.chain(*parse(method)[method].chain(rate, key, dimension, len(rows.counts)))
        tx = ef.simulate(chain, len(rows.counts), AXIS)

        def step(carry: Any, first: jax.Array) -> tuple[Any, Any]:
            x, state, sent = carry
            points = ef.query_points(state, x)
            grads = jax.tree.map(lambda z: logistic.gradients(z, rows, l2=REGULARISER), points)
            local = grads["params"]
            updates, state = tx.update(local, state, x, grads=grads)
            more = sent + information(method, state, first, dimension)
            return (optax.apply_updates(x, updates), state, more), (
                jnp.sum(local.mean(0) ** 2),
                sent,
            )

        start = jnp.zeros(dimension)
        first = jnp.arange(rounds) == 0
        return jax.lax.scan(step, (start, tx.init(start), jnp.zeros(())), first)[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, keys)


class Best(NamedTuple):
    """A method with its best multiple; curves are those of the run in the middle."""

    multiple: float
    rounds: float | None
    bits: float | None
    end: float  # median of the squared norms of the last quarter
    norms: np.ndarray
    sent: np.ndarray


def tune(norms: np.ndarray, sent: np.ndarray) -> Best:
    """The multiple with the fewest rounds, or the one with the lowest end if none arrives."""
    norms = np.where(norms < 1e100, norms, np.inf) / norms[:1, :1, :1]
    length = norms.shape[-1]
    # Below the tolerance for the last tenth of the run or more: an oscillation may dip earlier.
    rounds = length - (norms[..., ::-1] > TOLERANCE).argmax(-1)
    middle = np.argsort(rounds, axis=1, kind="stable")[:, rounds.shape[1] // 2]
    of_middle = rounds[np.arange(len(rounds)), middle]
    ends = np.median(norms[..., -(length // 4) :], axis=-1).mean(1)
    best = int(np.lexsort((ends, of_middle))[0])
    run, count = middle[best], int(of_middle[best])
    found = count <= 0.9 * length
    return Best(
        float(MULTIPLES[best]),
        count if found else None,
        float(sent[best, run, count]) if found else None,
        float(ends[best]),
        norms[best, run],
        sent[best, run],
    )


def envelope(x: np.ndarray, y: np.ndarray, pieces: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """The largest y in each stretch of x; stretches are equally long on a logarithmic axis."""
    ends = np.unique(np.geomspace(1, len(x), pieces).round().astype(int))
    starts = np.concatenate([[0], ends[:-1]])
    return x[starts], np.maximum.reduceat(y, starts)


def deal(
    features: np.ndarray, labels: np.ndarray, workers: int, dial: float, seed: int
) -> list[tuple[np.ndarray, ...]]:
    """Equal numbers of rows per worker, a share of them sorted by label; the rest is dropped."""
    each = len(labels) // workers
    if each < 1:
        raise libsvm.FormatError(f"{workers} workers need as many rows; there are {len(labels)}.")
    order = np.random.default_rng(seed).permutation(len(labels))[: each * workers]
    alike = round(dial * each)
    first, rest = np.split(order, [alike * workers])
    first = first[np.argsort(labels[first], kind="stable")]
    own = np.concatenate([first.reshape(workers, -1), rest.reshape(workers, -1)], axis=1)
    return [(features[rows], labels[rows]) for rows in own]


def disagreement(rows: logistic.Rows) -> float:
    """mean_i ||grad f_i(x*)||^2 over mean_i ||grad f_i(0)||^2, with x* by Newton's method."""
    signed, counts = rows
    flat = signed.reshape(-1, signed.shape[-1])
    weight = np.repeat(1 / (len(counts) * counts), signed.shape[1])
    x = np.zeros(flat.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(flat @ x))
        slope = -(weight * chance) @ flat + REGULARISER * x
        bend = (flat * (weight * chance * (1 - chance))[:, None]).T @ flat
        x = x - np.linalg.solve(bend + REGULARISER * np.eye(len(x)), slope)
    found = [
        np.asarray((logistic.gradients(jnp.asarray(z), rows, l2=REGULARISER) ** 2).sum(1).mean())
        for z in (x, 0 * x)
    ]
    return float(found[0] / found[1])


def run() -> None:
    """Runs all methods at every dial, writes the table and the picture."""
    dials = dials_of(FLAGS.dials)
    parse(FLAGS.methods)  # to refuse what is no method before anything is read
    features, labels = logistic.load(FLAGS.dataset, FLAGS.data_dir)
    dealt = {dial: deal(features, labels, FLAGS.workers, dial, FLAGS.seed) for dial in dials}
    folder, dimension = STUDY.open(), features.shape[1]
    found, rows = {}, []
    for dial, parts in dealt.items():
        constants = theory.logistic_regression([a for a, _ in parts], l2=REGULARISER)
        found[dial] = measure(logistic.rows_of(parts), constants)
        rows += measurements(dial, found[dial], constants, dimension)
    text = text_of(found, dimension, rows_each=len(labels) // FLAGS.workers)
    STUDY.close(folder, rows, text, picture_of(found))


def dials_of(words: list[str]) -> list[float]:
    """The numbers of --dials."""
    try:
        dials = [float(word) for word in words]
    except ValueError as error:
        raise flags.Error(f"--dials: {error}") from error
    if not dials or not all(0 <= dial <= 1 for dial in dials):
        raise flags.Error(f"--dials={','.join(words)}: numbers in [0, 1] are needed")
    return dials


class Found(NamedTuple):
    """What was measured at one position of the dial."""

    disagreement: float
    steps: dict[str, float]  # of each method's theory
    best: dict[str, Best]


def measure(data: logistic.Rows, constants: theory.Smoothness) -> Found:
    """Runs every method with all multiples of its step."""
    keys = jax.random.split(jax.random.key(FLAGS.seed), FLAGS.runs)
    dimension = data.signed.shape[-1]
    steps, best = {}, {}
    for name, method in parse(FLAGS.methods).items():
        steps[name] = method.step(constants, dimension)
        own = keys if method.random else keys[:1]
        measured = curves(name, steps[name] * MULTIPLES, own, data, FLAGS.rounds)
        best[name] = tune(*map(np.asarray, measured))
    return Found(disagreement(data), steps, best)


def measurements(
    dial: float, found: Found, constants: theory.Smoothness, dimension: int
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: one for each method, one for the problem."""
    rows = [
        {"method": name, "dial": dial, "theory_step": found.steps[name]}
        | {"multiple": best.multiple, "rounds": best.rounds, "bits": best.bits}
        | {"end": float(best.norms[-1]), "message_bits": message_bits(name, dimension)}
        for name, best in found.best.items()
    ]
    problem = {"dial": dial, "disagreement": found.disagreement}
    return [*rows, problem | {"L": constants.L, "L_QM": constants.L_QM}]


def text_of(found: dict[float, Found], dimension: int, rows_each: int) -> str:
    """The table and what its columns mean."""
    head = ["method", "message (bits)"]
    for dial in found:
        head += [f"dial {dial:g}: step", "rounds", "information (kbit)"]
    cells = []
    for name in parse(FLAGS.methods):
        cells.append([f"`{name}`", f"{message_bits(name, dimension):,}"])
        for at_dial in found.values():
            best = at_dial.best[name]
            cells[-1].append(f"x {best.multiple:g}")
            if best.rounds is None or best.bits is None:
                cells[-1] += [f"({best.end:.0e})", ""]
            else:
                cells[-1] += [f"{best.rounds:,}", f"{best.bits / 1000:,.1f}"]
    levels = ", ".join(f"{f.disagreement:.2g} (dial {dial:g})" for dial, f in found.items())
    return (
        f"# Disagreement of workers on {FLAGS.dataset}\n\n"
        + study.markdown(head, cells)
        + f"\n- {FLAGS.workers} workers with {rows_each} rows each, {dimension} "
        "features, 64-bit numbers. Rounds after which the squared gradient norm stays below "
        f"{TOLERANCE:g} of the first; in brackets its median over the last quarter of "
        f"{FLAGS.rounds:,} rounds, where it did not.\n"
        "- message: what one worker sends in an ordinary round, by its codec. information: what it "
        "sent until then, as the papers count it (dense and skipped rounds as such).\n"
        f"- step: times that of its theory. Random methods: the middle one of {FLAGS.runs} runs.\n"
        f"- mean_i |grad f_i|^2 at the minimum, over that at the start: {levels}.\n"
    )


def picture_of(found: dict[float, Found]) -> Any:
    """Curves by rounds above, by bits sent below; a column for each dial."""
    figure, axes = study.panels(2, len(found), (5 * len(found), 9), sharey=True)
    for column, (dial, at_dial) in enumerate(found.items()):
        for name, best in at_dial.best.items():
            method = parse(name)[name]
            look = {"color": method.colour, "linestyle": method.dashes, "lw": 1.8}
            shown = slice(0, 1 + int(1.3 * best.rounds) if best.rounds else None)
            norms = best.norms[shown]
            time, sent = np.arange(1, 1 + len(norms)), best.sent[shown] / 1000
            axes[0, column].plot(*envelope(time, norms), label=method.label, **look)
            axes[1, column].plot(*envelope(sent, norms), **look)
        axes[0, column].set(title=f"dial {dial:g}", xlabel="round", xscale="log")
        axes[1, column].set(xlabel="kilobits sent by one worker (information)", xscale="log")
    for axis in axes.flat:
        axis.axhline(TOLERANCE, color="#888888", lw=0.8)
        axis.set(yscale="log", ylim=(TOLERANCE / 5, 5))
    for axis in axes[:, 0]:
        axis.set(ylabel="squared gradient norm, relative (largest of a stretch)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
