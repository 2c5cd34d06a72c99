"""The choice of a learning rate from validation scores, and the table of a search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import processes, storage
from experiments.comparison import Epochs, Task, is_writer
from experiments.workers import Workers


def tune(
    values: flags.FlagValues,
    task: Task,
    workers: Workers,
    out_dir: Path,
    methods: Sequence[str],
    grid: list[float],
    command: str,
) -> None:
    """Trains the whole run for each rate, and writes the accuracies on what the task holds out.

    Args:
      values: the flags of the comparison.
      task: whose test set is a part of the training set.
      workers: where.
      out_dir: gets tuning.md.
      methods: to find rates for.
      grid: the rates to try.
      command: what was typed.
    """
    chosen: dict[str, float] = {}
    lines = []
    stop = processes.Stop()
    epochs = Epochs(task, workers, len(grid) * len(methods) * values.seeds * task.epochs)
    for method in methods:
        compiled = task.build(method, workers)
        scores = {}
        for rate in grid:
            results = []
            for seed in range(values.seeds):
                state, row = compiled.create(seed), {}
                for epoch in range(task.epochs):
                    state, row = epochs.train(compiled, state, rate, seed, epoch)
                    epochs.bar.set_postfix_str(f"{method} {rate:g}: {task.shown(row)}")
                    if stop.agreed():
                        raise KeyboardInterrupt
                    if row["lost"]:
                        row["test_accuracy"], row["test_loss"] = 0.0, 1e30
                        epochs.bar.update((task.epochs - epoch - 1) * task.training.blocks)
                        break
                results.append((row["test_accuracy"], -row["test_loss"]))
            scores[rate] = tuple(np.mean(results, axis=0))
        chosen[method] = robust_rate(scores)
        lines.append((method, scores))
        edge = ", the edge of the grid" if chosen[method] in (min(grid), max(grid)) else ""
        if is_writer():
            tqdm.write(f"{method}: best rate {chosen[method]:g}{edge}")
    epochs.bar.close()
    if is_writer():
        text = tuning_table(grid, lines, chosen, command)
        storage.write_text(out_dir / "tuning.md", text)
        print("\n" + text)


def robust_rate(scores: dict[float, tuple[float, float]]) -> float:
    """The best rate that does not lie at the edge of stability.

    At the edge a run depends on how a machine rounds: its accuracy moves by a point from one to
    another. A rate lies there if the next larger one of the grid has less than half of its
    accuracy; of the largest rate this is not known. If all do, the best is taken nevertheless.

    Args:
      scores: rate -> mean validation accuracy, and minus the mean loss.

    Example:
      >>> robust_rate({0.1: (0.95, -0.3), 0.3: (0.96, -0.2), 1.0: (0.97, -0.1), 3.0: (0.1, -9.0)})
      0.3
    """
    rates = sorted(scores)
    safe = [a for a, b in itertools.pairwise(rates) if scores[b][0] >= scores[a][0] / 2]
    return max(safe or rates, key=scores.__getitem__)


def tuning_table(
    grid: list[float],
    lines: list[tuple[str, dict[float, tuple[float, float]]]],
    chosen: dict[str, float],
    command: str,
) -> str:
    """Mean validation accuracy of every rate and method, and the flag that uses the best."""
    rows = [["method", *(f"{rate:g}" for rate in grid)], ["---"] + ["--:"] * len(grid)]
    for method, scores in lines:
        cells = [f"{100 * accuracy:.1f}" if accuracy else "lost" for accuracy, _ in scores.values()]
        best = grid.index(chosen[method])
        cells[best] = f"**{cells[best]}**"
        rows.append([f"`{method}`", *cells])
    flag = ",".join(f"{method}={rate:g}" for method, rate in chosen.items())
    return (
        "# Validation accuracy (%) by learning rate\n\n"
        + "".join("| " + " | ".join(row) + " |\n" for row in rows)
        + "\nBest accuracy, among equals the lowest validation loss, of the rates whose next "
        + "larger one keeps half of it. Made by `"
        + f"{command}`\n\n```\n--lr={flag}\n```\n"
    )
