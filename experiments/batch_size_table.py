"""What the batch size does to signs without memory: the main job, once per batch size.

```
python -m experiments.batch_size_table
python -m experiments.batch_size_table --flagfile=experiments/presets/mnist_batch128.flags \\
    --data_dir=DIR --out_dir=runs/mnist_table
python -m experiments.batch_size_table --flagfile=experiments/presets/ef_signsgd_cifar100.flags \\
    --data_dir=DIR --out_dir=runs/cifar100_table
```

The question of Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes" (2019): the smaller the batch the noisier the gradient, and the more a
sign without memory loses. Flags are those of `experiments.train`: the rates --lr were tuned at
--batch_size, and at the other --batch_sizes they are scaled in proportion. Without a
preset it trains on digits with one worker for 40 epochs.

OUT_DIR/batchB holds what the main job writes for batch size B; table.md, curves.png and
metrics.jsonl beside these folders join them. --resume goes on after an interruption.

Result on digits (2 CPU cores, one minute): at batch 128 / 32 / 8 the scaled sign without memory is
0.6 / 0.6 / 2.0 points below SGD with momentum, with error feedback 0.3 / 0.3 / 0.3.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import report, storage, study, train
from experiments.arguments import UsageError, parse_methods, parse_rates
from experiments.methods import METHODS

DEFAULT = Path(os.path.relpath(Path(__file__).parent / "presets" / "digits_batch128.flags"))

flags.DEFINE_list("batch_sizes", ["128", "32", "8"], "Examples per worker and step, per column.")
FLAGS = flags.FLAGS


def run() -> None:
    """Trains at every batch size, then writes the table and the picture."""
    ####################################################################################
    # The main job, once per batch size
    ####################################################################################
    if FLAGS.tune or FLAGS.sweep:
        raise UsageError("--tune and --sweep belong to experiments.train, with the same flags")
    if not all(size.isdecimal() and int(size) for size in FLAGS.batch_sizes):
        raise UsageError(f"--batch_sizes={FLAGS.batch_sizes}: not a list of whole numbers")
    sizes = [int(size) for size in FLAGS.batch_sizes]
    methods = parse_methods(FLAGS.methods, METHODS)
    if own := [method for method in methods if method not in METHODS]:
        raise UsageError(
            f"--methods: {own[0]} has its own rates, but here rates are scaled with the batch; "
            f"choose from {', '.join(METHODS)}"
        )
    rates, tuned_at = parse_rates(FLAGS.lr, methods, METHODS), FLAGS.batch_size
    out_dir = storage.folder(FLAGS.out_dir)
    words = [w for w in sys.argv[1:] if not w.lstrip("-").startswith("batch_sizes")]
    for size in sizes:
        scaled = [f"{method}={rate * size / tuned_at:.6g}" for method, rate in rates.items()]
        # Through the command line, which the main job records beside its results.
        sys.argv[1:] = [*words, f"--batch_size={size}", f"--lr={','.join(scaled)}"]
        sys.argv += [f"--out_dir={out_dir / f'batch{size}'}"]
        FLAGS.unparse_flags()
        FLAGS(sys.argv)
        train.run()

    ####################################################################################
    # Put together
    ####################################################################################
    folders = {size: out_dir / f"batch{size}" for size in sizes}
    rows = {size: storage.read_rows(folder) for size, folder in folders.items()}
    lines = "".join(
        json.dumps({"batch_size": size} | row) + "\n" for size in sizes for row in rows[size]
    )
    storage.write_text(out_dir / "metrics.jsonl", lines)
    text = table(methods, rows)
    storage.write_text(out_dir / "table.md", text)
    study.save(picture(methods, rows), out_dir / "curves.png")
    print("\n" + text + f"\nWritten: {out_dir / 'table.md'}, {out_dir / 'curves.png'}")


def accuracies(rows: report.Rows) -> dict[str, list[list[float]]]:
    """Test accuracies in percent: method, seed, epoch."""
    return {
        method: [[100 * row["test_accuracy"] for row in run] for run in runs]
        for method, runs in report.by_method(rows).items()
    }


def table(methods: list[str], rows: dict[int, report.Rows]) -> str:
    """Accuracy after the last epoch and the difference to sgdm, for each batch size."""
    head = ["method"]
    lines = [[f"`{method}`"] for method in methods]
    for size, found in rows.items():
        head += [f"batch {size}", "vs sgdm"]
        last = {method: [run[-1] for run in runs] for method, runs in accuracies(found).items()}
        for method, line in zip(methods, lines, strict=True):
            mean, std = report.mean_std(last[method])
            line.append(f"{mean:.2f} ± {std:.2f}")
            known = "sgdm" in last and method != "sgdm"
            line.append(f"{mean - report.mean_std(last['sgdm'])[0]:+.2f}" if known else "")
    epochs = max(row["epoch"] for found in rows.values() for row in found)
    workers = FLAGS.workers or "all"
    return (
        f"# {FLAGS.dataset}, {FLAGS.model}: test accuracy (%) by batch size\n\n"
        + study.markdown(head, lines)
        + f"\n- After the last of {epochs} epochs; mean and standard deviation of {FLAGS.seeds} "
        f"seeds, difference to `sgdm` in points. Workers: {workers}; the batch is per worker.\n"
        "- Learning rates are scaled in proportion to the batch.\n"
    )


def picture(methods: list[str], rows: dict[int, report.Rows]) -> Any:
    """The accuracy by batch size, and by epoch at the smallest one."""
    figure, axes = study.panels(1, 2, (11, 4.6))
    by_size = {size: accuracies(found) for size, found in rows.items()}
    smallest = min(rows)
    for place, method in enumerate(methods):
        colour, dashes = report.STYLES[method]
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "lw": 1.8}
        last = [[run[-1] for run in by_size[size][method]] for size in rows]
        mean, std = zip(*map(report.mean_std, last), strict=True)
        beside = [size * 1.05 ** (place - len(methods) / 2) for size in rows]  # bars side by side
        axes[0, 0].errorbar(
            beside, mean, std, marker="o", ms=5, capsize=3, label=report.LABELS[method], **style
        )
        runs = by_size[smallest][method]
        mean = [report.mean_std(list(values))[0] for values in zip(*runs, strict=True)]
        axes[0, 1].plot(range(1, len(mean) + 1), mean, **style)
    axes[0, 0].set(
        title="after the last epoch (bars: standard deviation)",
        xlabel="batch size (log scale; noise grows to the right)",
        ylabel="test accuracy (%)",
        xscale="log",
        xticks=list(rows),
        xticklabels=[str(size) for size in rows],
    )
    axes[0, 0].minorticks_off()
    axes[0, 0].invert_xaxis()
    ends = [values[-1] for runs in by_size[smallest].values() for values in runs]
    axes[0, 1].set(
        title=f"by epoch, batch {smallest}",
        xlabel="epoch",
        ylabel="test accuracy (%)",
        ylim=(max(0, 2 * min(ends) - 101), None),
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """Runs, and turns errors that the user can fix into one line and a non-zero exit."""
    train.main(argv, run)


def with_preset(argv: list[str]) -> list[str]:
    """The arguments, preceded by those of the digits preset if they name no preset."""
    named = any(word.lstrip("-").startswith("flagfile") for word in argv[1:])
    return argv if named else [argv[0], f"--flagfile={DEFAULT}", *argv[1:]]


if __name__ == "__main__":
    sys.argv = with_preset(sys.argv)
    app.run(main)
