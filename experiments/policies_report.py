"""The records of `experiments.policies`, its table and its picture; nothing is trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import lines, small_runs, storage, study

TOLERANCE = 0.015
"""Share by which the bytes of a policy and of its fixed level may differ."""

Row = dict[str, Any]


class Records:
    """What was trained: one JSON object a line, appended and never changed.

    Attributes:
      rows: all of them.
      about: what is common to all runs.
      methods: the run of a method by its name.
      levels: the run of a fixed level by its ratio, and how often its k is rounded up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.about: Row = {}
        self.methods: dict[str, Row] = {}
        self.levels: dict[tuple[float, int], Row] = {}
        try:
            for row in lines.read(path):
                self._take(row)
        except KeyError as error:
            raise storage.OutputError(f"{path}: a line has no {error}") from None

    def add(self, row: Row) -> None:
        """Appends a line to the file."""
        lines.append(self.path, row)
        self._take(row)

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        if "about" in row:
            self.about = row["about"]
        elif "method" in row:
            self.methods[row["method"]] = row
        else:
            self.levels[row["ratio"], row["ups"]] = row

    def pairs(self) -> list[tuple[str, Row, Row]]:
        """Every policy with its fixed level.

        Raises:
          OutputError: if there is no level whose bytes are those of a policy.
        """
        found = []
        for name, row in self.methods.items():
            if name == "dense":
                continue
            off = {key: abs(sent(level) / sent(row) - 1) for key, level in self.levels.items()}
            best = min(off, key=off.__getitem__, default=None)
            if best is None or off[best] > TOLERANCE:
                raise storage.OutputError(
                    f"{self.path}: no fixed level has the bytes of {name}; run it without --report"
                )
            found.append((name, row, self.levels[best]))
        return found


def sent(row: Row) -> float:
    """The bytes that a worker sends in the whole run, as the mean of the seeds."""
    return float(np.mean(row["bytes"]))


def line(name: str, row: Row) -> str:
    """What a finished run has found."""
    accuracy = small_runs.spread(np.asarray(row["accuracy"]))
    return f"{name}: {accuracy}%, loss {np.mean(row['loss']):.3f}, {sent(row) / 1e3:,.1f} kB"


def table(records: Records) -> str:
    """Each policy beside its fixed level."""
    head = ["policy", "kB of a worker", "fixed ratio", "its kB", "accuracy (%)", "of the fixed one"]
    head += ["difference", "training loss", "of the fixed one", "difference"]
    rows = []
    if "dense" in records.methods:
        row = records.methods["dense"]
        accuracy, loss = small_runs.spread(np.asarray(row["accuracy"])), np.mean(row["loss"])
        rows.append(["dense", f"{sent(row) / 1e3:,.0f}", "", "", accuracy, "", ""])
        rows[-1] += [f"{loss:.3f}", "", ""]
    for name, row, level in records.pairs():
        ours, other = (np.asarray(x["accuracy"]) for x in (row, level))
        loss, other_loss = (np.asarray(x["loss"]) for x in (row, level))
        rows.append([f"`{name}`" if name.isidentifier() else name, f"{sent(row) / 1e3:,.1f}"])
        rows[-1] += [f"{100 * level['ratio']:.2f}%", f"{sent(level) / 1e3:,.1f}"]
        rows[-1] += [small_runs.spread(ours), small_runs.spread(other)]
        rows[-1] += [small_runs.compared(ours, other), f"{loss.mean():.3f}"]
        rows[-1] += [f"{other_loss.mean():.3f}", small_runs.compared(loss, other_loss, 3)]
    return study.markdown(head, rows)


def picture(records: Records) -> Any:
    """Accuracy and training loss of every seed, with the means, of each policy and its level."""
    pairs = records.pairs()
    figure, axes = study.panels(1, 2, (10, 0.9 + 0.42 * len(pairs)))
    for axis, key in zip(axes[0], ("accuracy", "loss"), strict=True):
        for i, (_, *rows) in enumerate(pairs):
            drawn = zip(rows, (-0.14, 0.14), (study.VERMILION, study.BLACK), "ox", strict=True)
            for row, shift, colour, marker in drawn:
                places = [i + shift] * len(row[key])
                axis.plot(row[key], places, marker, color=colour, ms=5, alpha=0.7)
                axis.plot(np.mean(row[key]), i + shift, "|", color=colour, ms=11, mew=2)
        if "dense" in records.methods:
            axis.axvline(np.mean(records.methods["dense"][key]), color=study.SKY, ls="--")
        names = [f"{name}, {sent(row) / 1e3:,.0f} kB" for name, row, _ in pairs]
        axis.set_yticks(range(len(pairs)), names if key == "accuracy" else [""] * len(pairs))
        axis.invert_yaxis()
    axes[0, 0].set(xlabel="test accuracy (%), each seed and the mean")
    axes[0, 1].set(xlabel="training loss at the end", xscale="log")
    axes[0, 0].plot([], [], "o", color=study.VERMILION, label="policy")
    axes[0, 0].plot([], [], "x", color=study.BLACK, label="one ratio, the same bytes")
    axes[0, 0].plot([], [], "--", color=study.SKY, label="mean of dense")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def text(records: Records) -> str:
    """The table, and what it is of."""
    if not records.methods:
        raise storage.OutputError(f"{records.path}: no run is there yet")
    about, given = records.about, records.about["flags"]
    words = (
        f"\n- {given['dataset']}, {about['training_images']:,} training images, "
        f"{about['parameters']:,} parameters, {given['workers']} workers x {given['batch_size']} "
        f"examples, {about['steps']:,} steps, {given['seeds']} seeds, {about['hardware']}. "
        "Accuracy is on the test set, mean and deviation; differences are by seed, with their "
        f"standard error. The bytes of a pair differ by at most {100 * TOLERANCE:g}%.\n"
    )
    return "# Policies at equal bytes\n\n" + table(records) + words
