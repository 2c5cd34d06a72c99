"""What adaptive compression buys: each policy against one fixed level at the same bytes.

```
python -m experiments.policies             # trains what is missing, then the table
python -m experiments.policies --report    # the table and the picture alone
```

Error feedback with top-k on a perceptron of four layers, whose gradients differ in kind, and 8
workers with 2 examples each. A policy on the host decides after every sixth of the run, from what
worker 0 of the first seed would compress then; all seeds share the choice. A controller decides in
the program, for each seed; a monitor counts what it sends. A single ratio for all leaves and steps
that sends as many bytes in the whole run is what a policy has to beat; its k is rounded up in some
parts of the run and down in the others, so that the bytes agree. Every finished run is one
line of --records, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from experiments import policies_report, small_runs, storage, study
from experiments.arguments import UsageError
from experiments.policies_report import TOLERANCE, Records
from experiments.small_runs import AXIS, Carry, Task

STUDY = study.Study("policies", __doc__)
FLAGS = STUDY.flags
RECORDS = str(Path(__file__).parent / "records" / "policies.jsonl")
small_runs.define_flags(FLAGS)
flags.DEFINE_float("ratio", 0.002, "Of the level from which all begin.", 0, 1, flag_values=FLAGS)
flags.DEFINE_list("methods", [], "Some of METHODS; all by default.", flag_values=FLAGS)
flags.DEFINE_string("records", RECORDS, "The finished runs, one a line.", flag_values=FLAGS)
flags.DEFINE_bool("report", False, "Train nothing.", flag_values=FLAGS)
FLAGS.set_default("hidden", ["64", "64", "64"])

SETTINGS = ("dataset", "train_images", "hidden", "workers", "batch_size", "epochs", "stretches")
SETTINGS += ("seeds", "lr", "ratio")
"""The flags that decide the numbers."""


class Seen(NamedTuple):
    """What a policy may look at when it decides, at the beginning of a stretch."""

    task: Task
    history: list[Carry]  # at the beginning of every stretch so far
    ratio: float

    @property
    def example(self) -> Any:
        return self.task.example(self.history[-1])

    @property
    def params(self) -> Any:
        """Shapes of the parameters."""
        return shapes(self.task)


def shapes(task: Task) -> Any:
    """Shapes and dtypes of the parameters of one seed."""
    of_seed = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
    return jax.tree.map(of_seed, jax.eval_shape(task.params))


########################################################################################
# Compressors: on the host for the next stretch, or in the program for the whole run
########################################################################################


def dense(seen: Seen) -> ef.Compressor:
    del seen
    return ef.identity()


def fixed(seen: Seen) -> ef.Compressor:
    return ef.top_k(seen.ratio)


def levels(ratio: float) -> list[ef.Compressor]:
    """Ratios around the given one, which is in the middle."""
    return [ef.top_k(min(1.0, ratio * factor)) for factor in (0.1, 0.3, 1, 3, 10)]


def within_bytes(seen: Seen) -> ef.Compressor:
    """The least error within the bytes of the given ratio."""
    budget = ef.message_bits(ef.top_k(seen.ratio), seen.params) // 8
    return ef.policies.within_bytes(seen.example, levels(seen.ratio), budget)


def l_greco(seen: Seen) -> ef.Compressor:
    """The fewest bytes with the error of the given ratio."""
    return ef.policies.l_greco(seen.example, levels(seen.ratio), baseline=2)


def with_contraction(seen: Seen) -> ef.Compressor:
    """The fewest bytes of each leaf that contract by a tenth."""
    return ef.policies.with_contraction(seen.example, levels(seen.ratio), alpha=0.1)


def accordion(seen: Seen) -> ef.Compressor:
    """Three times the ratio where the gradient's norm changes, three tenths of it elsewhere."""
    task, light, heavy = seen.task, ef.top_k(3 * seen.ratio), ef.top_k(0.3 * seen.ratio)
    if len(seen.history) < 2:
        return light

    def norms(at: int) -> Any:
        """Of all that was applied in a stretch, in units of the gradient; means over the seeds."""
        before, after = seen.history[at - 1 : at + 1 or None]
        change = lambda a, b: np.linalg.norm(np.asarray(b - a).reshape(len(a), -1), axis=1).mean()  # noqa: E731
        rate = task.rate_at(before.stretch)
        return jax.tree.map(lambda a, b: change(a, b) / rate, before.params, after.params)

    now = seen.history[-1].stretch
    return ef.policies.accordion(
        light,
        heavy,
        norms(-1),
        norms(-2) if len(seen.history) > 2 else None,
        rate_fell=task.rate_at(now) < task.rate_at(now - 1),
    )


def around(ratio: float) -> list[ef.Compressor]:
    """A few levels for all leaves, from cheap to dear."""
    return [ef.top_k(min(1.0, ratio * factor)) for factor in (0.3, 1, 3)]


def hold_bytes(seen: Seen) -> ef.Compressor:
    """Three levels that take turns, within the bytes of one and a half times the ratio."""
    budget = ef.message_bits(ef.top_k(1.5 * seen.ratio), seen.params) // 8
    return ef.policies.hold_bytes(around(seen.ratio), budget)


def hold_contraction(seen: Seen) -> ef.Compressor:
    """The cheapest of three levels that contracts by a tenth."""
    return ef.policies.hold_contraction(around(seen.ratio), 0.1)


def gradual(seen: Seen) -> ef.Compressor:
    """From ten times the ratio to three tenths of it, in the first half of the run."""
    steps = seen.task.steps // 2
    schedule = optax.exponential_decay(min(1.0, 10 * seen.ratio), steps, 0.03)
    return ef.policies.gradual(ef.top_k, schedule, steps, levels=3)


def dgc_warmup(seen: Seen) -> ef.Compressor:
    """DGC's: four epochs until the ratio is reached."""
    task = seen.task
    return ef.policies.dgc_warmup(seen.ratio, task.steps // task.epochs, min(4, task.epochs - 1))


########################################################################################
# Rules
########################################################################################


def feedback(compressor: ef.Compressor) -> optax.GradientTransformation:
    return ef.error_feedback(compressor, axis_name=AXIS)


def injected(compressor: ef.Compressor) -> optax.GradientTransformation:
    """The residual takes part fully while updates are large, and to a fifth when they are small."""
    strength = ef.policies.OfNorm(lambda norm: jnp.clip(2 * norm, 0.2, 1.0))
    return ef.policies.steer_residual(feedback(compressor), injection=strength, axis_name=AXIS)


def retained(compressor: ef.Compressor) -> optax.GradientTransformation:
    """Up to a twentieth of the residual is dropped in a step, the more the larger updates are."""
    kept = ef.policies.OfNorm(lambda norm: 1 - 0.05 * norm)
    return ef.policies.steer_residual(feedback(compressor), retention=kept, axis_name=AXIS)


def counted(compressor: ef.Compressor) -> optax.GradientTransformation:
    """A monitor counts the bytes of a compressor that decides for itself."""
    return ef.monitor(feedback(compressor), every=1 << 30)


class Method(NamedTuple):
    """A compressor, the rule around it, and whether it is chosen again before every stretch."""

    choose: Callable[[Seen], ef.Compressor]
    rule: Callable[[ef.Compressor], optax.GradientTransformation] = feedback
    again: bool = False


METHODS = {
    "dense": Method(dense),
    "within_bytes": Method(within_bytes, again=True),
    "l_greco": Method(l_greco, again=True),
    "accordion": Method(accordion, again=True),
    "hold_bytes": Method(hold_bytes, counted),
    "hold_contraction": Method(hold_contraction, counted),
    "gradual": Method(gradual),
    "dgc_warmup": Method(dgc_warmup),
    "injection by norm": Method(fixed, injected),
    "retention by norm": Method(fixed, retained),
    "with_contraction": Method(with_contraction, again=True),
}

########################################################################################
# The study
########################################################################################


class Trainer:
    """Trains methods; decisions and levels that agree share a program."""

    def __init__(self, task: Task) -> None:
        self.task, self.params = task, shapes(task)
        self.programs: dict[Any, Any] = {}

    def train(self, method: Method, ratio: float) -> dict[str, Any]:
        """Accuracy, loss and bytes of the runs of all seeds."""
        task, start = self.task, Seen(self.task, [], ratio)
        compressor = ef.top_k(ratio) if method.again else method.choose(start)
        seen = start._replace(history=[task.begin(method.rule(compressor))])
        sent, length = 0, task.steps // task.stretches
        for stretch in range(task.stretches):
            if method.again:
                compressor = method.choose(seen)
            bits = self.bits(compressor)
            key = bits if method.rule is feedback else method
            if key not in self.programs:
                self.programs[key] = task.program(method.rule(compressor), seen.history[-1])
            seen.history.append(task.stretch(self.programs[key], seen.history[-1])[0])
            sent += sum(map(sum, bits[stretch * length : (stretch + 1) * length]))
        end = seen.history[-1]
        row = {"accuracy": task.accuracy(end).tolist(), "loss": task.training_loss(end).tolist()}
        if method.rule is not counted:
            return row | {"bytes": [sent / 8] * task.seeds}
        states = [jax.tree.map(lambda x, i=i: x[i], end.state) for i in range(task.seeds)]
        return row | {"bytes": [ef.measure.summary(x)["message_bytes"] for x in states]}

    def bits(self, compressor: ef.Compressor) -> tuple[tuple[int, ...], ...]:
        """The bits of one worker's message of each leaf, for every step of a run."""
        located = jax.tree_util.tree_leaves_with_path(self.params)
        likes = [(ef.extend.path_string(path), ef.extend.like_of(x)) for path, x in located]

        @functools.cache
        def of_codec(codec: Any) -> tuple[int, ...]:
            return tuple(ef.extend.for_leaf(codec, path, x).bits(x.shape) for path, x in likes)

        at = getattr(compressor.codec, "at", lambda _: compressor.codec)
        return tuple(of_codec(at(step)) for step in range(self.task.steps))


class Level(NamedTuple):
    """One ratio for all leaves, at which k is rounded up in some stretches and down in the others.

    Attributes:
      down: a ratio just below that one.
      up: a ratio just above it.
      ups: the number of stretches in which k is rounded up.
    """

    down: float
    up: float
    ups: int

    def choose(self, seen: Seen) -> ef.Compressor:
        """The compressor of the next stretch; those that are rounded up are spread evenly."""
        stretch, of = len(seen.history) - 1, seen.task.stretches
        rounded_up = (stretch + 1) * self.ups // of > stretch * self.ups // of
        return ef.top_k(self.up if rounded_up else self.down)


def level_of(size: float, params: Any, stretches: int) -> Level:
    """The fixed level whose messages of a whole model have this mean number of bytes.

    Raises:
      UsageError: if it does not come within ``TOLERANCE``.
    """
    down, up = 0.0, 1.0
    bytes_of = lambda ratio: ef.message_bits(ef.top_k(ratio), params) / 8  # noqa: E731
    for _ in range(40):
        middle = (down + up) / 2
        down, up = (middle, up) if bytes_of(middle) < size else (down, middle)
    down = down or up
    low, high = bytes_of(down), bytes_of(up)
    ups = round(stretches * (size - low) / (high - low)) if high > low else 0
    found = low + (high - low) * ups / stretches
    if abs(found - size) > TOLERANCE * size:
        raise UsageError(
            f"no fixed ratio sends {size:,.0f} bytes a step; the nearest sends {found:,.0f}. "
            "Give a larger model with --hidden, or another --ratio."
        )
    return Level(down, up, ups)


def run() -> None:
    """Trains what is missing, and writes the table and the picture."""
    if unknown := [name for name in FLAGS.methods if name not in METHODS]:
        raise flags.IllegalFlagValueError(
            f"flag --methods={','.join(unknown)}: choose of {', '.join(METHODS)}."
        )
    if not FLAGS.ratio:
        raise flags.IllegalFlagValueError("flag --ratio=0: top-k keeps a ratio in (0, 1].")
    storage.check_free(storage.folder(FLAGS.out_dir), {}, resume=False, overwrite=FLAGS.overwrite)
    records = Records(Path(FLAGS.records))
    if not FLAGS.report:
        with jax.enable_x64(False):
            _train(records)
    text, figure = policies_report.text(records), policies_report.picture(records)
    STUDY.close(STUDY.open(), records.rows, text, figure)


def _train(records: Records) -> None:
    task = Task(FLAGS)
    trainer = Trainer(task)
    settings = {name: FLAGS[name].value for name in SETTINGS}
    if not records.about:
        about = {"flags": settings, "steps": task.steps, "training_images": len(task.train[1])}
        about |= {"parameters": sum(x.size for x in jax.tree.leaves(trainer.params))}
        about |= {"versions": {name: version(name) for name in ("jax", "optax")}}
        records.add({"about": about | {"hardware": f"{os.cpu_count()} CPU cores"}})
    elif changed := [n for n in SETTINGS if records.about["flags"].get(n) != settings[n]]:
        raise UsageError(
            f"--records={records.path} was made with --{changed[0]}="
            f"{records.about['flags'].get(changed[0])}; give the same flags or another file."
        )
    for name in FLAGS.methods or METHODS:
        if name not in records.methods:
            row = trainer.train(METHODS[name], FLAGS.ratio)
            records.add({"method": name} | row)
            print(policies_report.line(name, row), flush=True)
        if name == "dense":
            continue
        size = float(np.mean(records.methods[name]["bytes"])) / task.steps
        level = level_of(size, trainer.params, task.stretches)
        if (level.up, level.ups) not in records.levels:
            row = trainer.train(Method(level.choose, again=True), level.up)
            records.add({"ratio": level.up, "ups": level.ups} | row)
            print(policies_report.line(f"fixed, {level.up:.5f}", row), flush=True)


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
