"""What a smaller memory costs: accuracy, bytes and time for each format of the residual.

```
python -m experiments.memories
```

Error feedback with top-k stores its residual as float32 and in smaller formats, and on the host.
Model, initial parameters, order of the data and learning rate are the same for all. All programs
are compiled first, and then run in turn, part by part, so that their times can be compared.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from absl import flags

import ef_optax as ef
from experiments import small_runs, study
from experiments.small_runs import AXIS, Task

STUDY = study.Study("memories", __doc__)
FLAGS = STUDY.flags
small_runs.define_flags(FLAGS)
flags.DEFINE_float("ratio", 0.01, "Of top-k.", 0, 1, flag_values=FLAGS)
flags.DEFINE_list("methods", None, "Some of MEMORIES; all by default.", flag_values=FLAGS)

MEMORIES = {
    "float32": None,
    "bfloat16": ef.cast("bfloat16", key=0),
    "8 bits": ef.block_quantize(8, block=128, key=0),
    "4 bits": ef.block_quantize(4, block=128, key=0),
    "4 bits twice": ef.fcc(ef.block_quantize(4, block=128, key=0), 2),
    "largest tenth": ef.top_k(0.1),
    "a quarter of the rows": ef.row_top_k(0.25),
    "on the host": ef.on_host(),
    "4 bits on the host": ef.on_host(ef.block_quantize(4, block=128, key=0)),
}
"""The values of `memory=`. "Largest tenth" and "rows" drop what they do not keep; others round."""


def run() -> None:
    """Trains with every memory, and writes the table and the picture."""
    with jax.enable_x64(False):
        _run()


def _run() -> None:
    names = FLAGS.methods or list(MEMORIES)
    if unknown := [name for name in names if name not in MEMORIES]:
        raise flags.IllegalFlagValueError(
            f"flag --methods={','.join(unknown)}: choose of {', '.join(MEMORIES)}."
        )
    task = Task(FLAGS)
    folder = STUDY.open()  # flags that do not fit together leave nothing there
    feedback = {
        name: ef.error_feedback(ef.top_k(FLAGS.ratio), memory=MEMORIES[name], axis_name=AXIS)
        for name in names
    }
    carries = {name: task.begin(rule) for name, rule in feedback.items()}
    programs = {name: task.program(rule, carries[name]) for name, rule in feedback.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(task.stretches):
        for name in names:
            carries[name], second = task.stretch(programs[name], carries[name])
            seconds[name].append(second)
    like = jax.tree.map(lambda x: x[0], carries[names[0]].params)
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "accuracy": task.accuracy(carries[name]).tolist(),
            "bytes": ef.measure.state_bytes(rule, like),
            "host_bytes": ef.measure.state_bytes(rule, like, space="host"),
            "milliseconds": 1000 * float(np.median(seconds[name])),
            "relative": float(np.median(np.divide(seconds[name], seconds[names[0]]))),
        }
        for name, rule in feedback.items()
    ]
    first = rows[0]
    cells = [
        [
            row["method"],
            f"{row['bytes']:.2f}",
            small_runs.spread(np.asarray(row["accuracy"])),
            small_runs.compared(np.asarray(row["accuracy"]), np.asarray(first["accuracy"])),
            f"{row['milliseconds']:.2f}",
            f"{row['relative']:.2f}",
        ]
        for row in rows
    ]
    head = ["residual", "bytes a parameter", "accuracy (%)", f"minus that of {first['method']}"]
    head += ["processor ms a step", "relative"]
    words = (
        f"\n- {FLAGS.dataset}, {len(task.train[1]):,} training images, {task.workers} workers x "
        f"{task.batch} examples, {task.steps:,} steps, {task.seeds} seeds, top-k of "
        f"{FLAGS.ratio:g}. Accuracy is on the test set, mean and deviation; differences are by "
        "seed, with their standard error. Time is the processor's, of all workers together, the "
        f"median of {task.stretches} parts; relative is the median of the ratios of each part.\n"
    )
    table = "# The residual in fewer bytes\n\n" + study.markdown(head, cells)
    STUDY.close(folder, rows, table + words, picture(rows))


def picture(rows: list[dict[str, Any]]) -> Any:
    """The accuracy of every seed, and the mean, for each memory."""
    figure, axes = study.panels(1, 1, (7, 4.2))
    axis = axes[0, 0]
    for i, row in enumerate(rows):
        axis.plot(row["accuracy"], [i] * len(row["accuracy"]), "o", color=study.BLUE, alpha=0.6)
        axis.plot(np.mean(row["accuracy"]), i, "|", color=study.BLACK, ms=18, mew=2)
    labels = [f"{row['method']}, {row['bytes']:.2f} bytes" for row in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set(xlabel="test accuracy (%), each seed and the mean")
    return figure


def main(argv: list[str]) -> None:
    """Runs the study with these arguments; the first is the program's name."""
    STUDY.main(run, argv)


if __name__ == "__main__":
    main(sys.argv)
