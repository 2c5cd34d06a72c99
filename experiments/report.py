"""The table and the picture of a comparison, made from the files that the runs wrote.

`python -m experiments.report --out_dir=runs/demo` draws them again without training anything.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments import storage

LABELS = {
    "sgdm": "SGD with momentum, dense",
    "signsgd": "scaled sign, no memory",
    "signsgdm": "sign of momentum, no memory",
    "ef_signsgd": "scaled sign + error feedback",
    "top_k": "top-k, no memory",
    "ef_top_k": "top-k + error feedback",
}
# Okabe and Ito's colours, which stay distinct for every common kind of colour blindness. Lines are
# solid with error feedback and dashed without, so the picture also reads in black and white.
STYLES = {
    "sgdm": ("#000000", (0, (6, 2))),
    "signsgd": ("#D55E00", (0, (3, 1.5))),
    "signsgdm": ("#CC79A7", (0, (1, 1.2))),
    "ef_signsgd": ("#0072B2", "-"),
    "top_k": ("#E69F00", (0, (5, 1.5, 1, 1.5))),
    "ef_top_k": ("#009E73", "-"),
}
OTHERS = ("#56B4E9", "#882255", "#44AA99", "#999933", "#332288", "#AA4499")
"""For expressions, in their order; these are told apart by their dashes as well."""

OTHER_DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)))

Rows = list[dict[str, Any]]


class Quantity(NamedTuple):
    """What a comparison is judged by."""

    key: str  # in metrics.jsonl
    name: str
    unit: str
    scale: float
    best: Callable[..., float]
    of_differences: str
    digits: int

    @property
    def head(self) -> str:
        return f"{self.name} ({self.unit})"


QUANTITIES = {
    "accuracy": Quantity("test_accuracy", "test accuracy", "%", 100.0, max, "points", 2),
    "loss": Quantity("test_loss", "held-out loss", "nats", 1.0, min, "nats", 4),
}
"""By the name that config.json gives it."""


def quantity(config: dict[str, Any]) -> Quantity:
    """What the runs of a folder are judged by."""
    return QUANTITIES[config["about"].get("quantity", "accuracy")]


def reference(config: dict[str, Any]) -> str:
    """The method with which the others are compared: dense SGD with momentum, or the first one."""
    methods = config["flags"]["methods"]
    return methods[0] if quantity(config).key == "test_loss" else "sgdm"


def style(method: str, methods: list[str]) -> tuple[str, Any]:
    """Colour and dashes of a method among those of a run."""
    if method in STYLES:
        return STYLES[method]
    index = [other for other in methods if other not in STYLES].index(method)
    return OTHERS[index % len(OTHERS)], OTHER_DASHES[index // len(OTHERS) % len(OTHER_DASHES)]


def by_method(rows: Rows) -> dict[str, list[Rows]]:
    """The rows of each method, one list per seed, in the order of the epochs."""
    runs: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["epoch"]):
        runs[row["method"]][row["seed"]].append(row)
    return {method: list(seeds.values()) for method, seeds in runs.items()}


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


########################################################################################
# table.md
########################################################################################


def table(config: dict[str, Any], rows: Rows, wire: dict[str, Any]) -> str:
    """The Markdown table; methods in the order of the flags, differences in percentage points."""
    chosen, about = config["flags"], config["about"]
    workers, judged, base = chosen["workers"], quantity(config), reference(config)
    runs = by_method(rows)
    final, best = {}, {}
    for method in chosen["methods"]:
        seeds = [[judged.scale * row[judged.key] for row in run] for run in runs.get(method, [])]
        if seeds:
            final[method] = mean_std([values[-1] for values in seeds])
            epochs = itertools.zip_longest(*seeds)
            best[method] = judged.best(
                statistics.fmean(a for a in epoch if a is not None) for epoch in epochs
            )

    head = ["method", "learning rate", judged.head, f"best epoch ({judged.unit})"]
    head += [f"vs {base} ({judged.of_differences})", "message (bytes/step)", "factor"]
    if workers > 1:
        head += ["link (bytes/step)", "factor"]
    lines = [head, ["---"] * 3 + ["--:"] * (len(head) - 3)]
    dense, digits = about["dense_bytes"], judged.digits
    for method in final:
        mean, std = final[method]
        known = base in final and method != base
        gap = f"{mean - final[base][0]:+.{digits}f}" if known else ""
        sent = average(wire[method])
        spread = f" ± {std:.{digits}f}" if chosen["seeds"] > 1 else ""
        # A bar ends a cell of Markdown, in code too, unless it is escaped.
        short = about.get("expressions", dict.fromkeys(LABELS)).get(method, method) != method
        rate = f"{chosen['lr'][method]:g}" if short else "its own"
        line = [f"`{method}`".replace("|", "\\|"), rate, f"{mean:.{digits}f}{spread}"]
        line += [f"{best[method]:.{digits}f}", gap]
        bound = "≤ " if sent.get("at_most") else ""
        line += [f"{bound}{sent['message_bytes']:,}", _factor(dense, sent["message_bytes"])]
        if workers > 1:
            ring = 2 * (workers - 1) * 2 * dense // workers  # ring all-reduce, sent + received
            line += [f"{bound}{sent['link_bytes']:,}", _factor(ring, sent["link_bytes"])]
        lines.append(line)

    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return (
        f"# {title(config)}: {workers} worker{'s' if workers > 1 else ''}, batch "
        f"{chosen['batch_size']} each\n\n{text}\n"
        + "\n".join(f"- {note}" for note in _notes(config, wire))
        + "\n"
    )


def title(config: dict[str, Any]) -> str:
    """What is learned, and by which model."""
    chosen = config["flags"]
    if "text" in chosen:
        return f"{chosen['text']}, transformer of {chosen['size']}"
    return f"{chosen['dataset']}, {chosen['model']}"


def average(sent: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a step on average, where the period of local steps is known; else what is given."""
    period, sometimes = sent.get("period", 1), sent.get("sometimes")
    if period == 1 or not sometimes:
        return sent
    return {name: round(sent[name] - (1 - 1 / period) * sometimes[name]) for name in sometimes}


def _factor(dense: float, sent: float) -> str:
    return f"{dense / sent:.1f}x" if sent else ""


def _notes(config: dict[str, Any], wire: dict[str, Any]) -> list[str]:
    chosen, about = config["flags"], config["about"]
    seeds = chosen["seeds"]
    of_what = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    notes = (
        _notes_on_text(config, of_what) if "text" in chosen else _notes_on_images(config, of_what)
    )
    if chosen["workers"] > 1:
        notes.append(
            f"Bytes are read from the compiled program. *Message*: what one of the "
            f"{chosen['workers']} workers contributes to a step; its factor is against "
            f"{about['dense_bytes']:,} bytes of fp32 gradient. *Link*: sent plus received per "
            "worker under ring algorithms; its factor is against a dense ring all-reduce."
        )
    else:
        notes.append(
            "With one worker nothing travels; *message* is the size its codec states, against "
            f"{about['dense_bytes']:,} bytes of fp32 gradient."
        )
    if any(sent.get("period", 1) > 1 for sent in wire.values()):
        notes.append("Bytes of local steps are the average over the steps between two exchanges.")
    if any(average(sent).get("at_most") for sent in wire.values()):
        notes.append(
            "≤: some steps of this method send less or nothing (schedules, policies); the bytes "
            "are those of a step that sends all."
        )
    notes.append(f"{about['parameters']:,} parameters; {about['hardware']}.")
    notes.append(f"Made by `{about['command']}`")
    return notes


def _notes_on_images(config: dict[str, Any], of_what: str) -> list[str]:
    chosen = config["flags"]
    drops = ", ".join(f"{drop:.0%}" for drop in chosen["lr_drops"]) or "never"
    others = [method for method in chosen["methods"] if method not in LABELS]
    notes = [
        f"Test accuracy after the last of {chosen['epochs']} epochs, {of_what}; *best epoch*: the "
        "highest mean over the seeds at any epoch, which peeks at the test set and is given "
        "because published tables do.",
        f"Learning rate divided by 10 at: {drops}. Weight decay {chosen['weight_decay']:g} is "
        "added to the gradient before it is compressed"
        + (", except in methods that are expressions." if others else "."),
    ]
    if {"top_k", "ef_top_k"} & set(chosen["methods"]):
        notes.append(f"Top-k keeps {chosen['ratio']:.3g} of each tensor's values.")
    return notes


def _notes_on_text(config: dict[str, Any], of_what: str) -> list[str]:
    chosen, about = config["flags"], config["about"]
    bits = "; a character is a token, so bits a character are nats / 0.693"
    notes = [
        f"Loss in nats for each held-out token after {chosen['steps']:,} steps of "
        f"{about['tokens_per_step']:,} tokens, {of_what}; *best epoch*: the lowest mean over the "
        f"seeds at any evaluation (every {chosen['eval_every']} steps)"
        + (bits if chosen["units"] == "characters" and about["characters"] else "")
        + ".",
    ]
    return notes + [
        f"`{name}`: `{expression}`".replace("|", "\\|")
        for name, expression in about["expressions"].items()
        if name != expression
    ]


########################################################################################
# curves.png
########################################################################################


def curves(config: dict[str, Any], rows: Rows, wire: dict[str, Any], path: Path) -> None:
    """The held-out quantity and the training loss against epochs and against megabytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib import ticker

    chosen, judged, per_epoch = config["flags"], quantity(config), 1
    if "text" in chosen:
        per_epoch = config["about"]["steps_per_epoch"]
    runs = by_method(rows)
    methods = [method for method in chosen["methods"] if method in runs]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row", layout="constrained")
    finals, losses = [], []
    for method in methods:
        length = min(len(run) for run in runs[method])
        epochs = np.arange(1, length + 1)
        sent = (
            epochs
            * config["about"]["steps_per_epoch"]
            * average(wire[method])["message_bytes"]
            / 1e6
        )
        colour, dashes = style(method, methods)
        for row, key, scale in ((0, judged.key, judged.scale), (1, "train_loss", 1)):
            values = np.array([[scale * r[key] for r in run[:length]] for run in runs[method]])
            mean = values.mean(0)
            (finals if row == 0 else losses).append(mean)
            for column, x in ((0, epochs * per_epoch), (1, sent)):
                axis = axes[row, column]
                axis.plot(
                    x,
                    mean,
                    color=colour,
                    linestyle=dashes,
                    lw=1.8,
                    label=LABELS.get(method, method),
                )
                axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)

    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    for axis in axes.flat:
        axis.grid(True, color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_xlabel("epoch" if per_epoch == 1 else "step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[:, 1]:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(plain)
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        what = "sent by each worker" if chosen["workers"] > 1 else "that a worker would send"
        axis.set_xlabel(f"megabytes {what} (messages, log scale)")
    axes[0, 0].set_ylabel(judged.head)
    axes[1, 0].set_ylabel("training loss (mean of the epoch, log scale)")
    axes[1, 0].set_yscale("log")
    axes[1, 0].yaxis.set_major_formatter(plain)
    axes[1, 0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[1, 0].yaxis.set_minor_formatter(ticker.NullFormatter())
    # The picture compares the end of training; the first epochs may leave the frame.
    low = min(mean[-1] for mean in finals)
    high = max(mean.max() for mean in finals)
    if judged.best is max:
        low, high = low - 2.0 * max(high - low, 1.0), high + 0.4 * (high - low) + 0.5
    else:
        low, high = min(mean.min() for mean in finals) - 0.05, max(mean[-1] for mean in finals)
        high += high - low
    axes[0, 0].set_ylim(max(0.0, low), high)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 40 else 1  # expressions may be long
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    seeds = chosen["seeds"]
    figure.suptitle(
        f"{title(config)}, {chosen['workers']} worker(s) x batch "
        f"{chosen['batch_size']}: mean of {seeds} seed(s), band from lowest to highest"
    )
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    temporary.replace(path)


def write(out_dir: Path) -> str:
    """Writes table.md and curves.png into `out_dir`; returns the table."""
    config = storage.read_json(out_dir / "config.json")
    rows = storage.read_rows(out_dir)
    wire = storage.read_json(out_dir / "wire.json")
    if not rows:
        raise storage.OutputError(f"{out_dir}: no finished epoch in metrics.jsonl")
    text = table(config, rows, wire)
    storage.write_text(out_dir / "table.md", text)
    curves(config, rows, wire, out_dir / "curves.png")
    return text


def main(argv: list[str]) -> None:
    """Redraws the report of `--out_dir`."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}")
    try:
        print(write(storage.folder(_OUT_DIR.value)))
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} does not exist; run experiments.train first")
    except storage.OutputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _OUT_DIR = flags.DEFINE_string("out_dir", "runs/demo", "Folder that experiments.train wrote.")
    app.run(main)
