"""The picture of losses by seconds, one panel a rate."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from benchmarks.slow_network import curves, report
from benchmarks.slow_network import records as raw

RATES = (50e6, 200e6, 1e9, None)

TICKS = (10, 30, 100, 300)

STYLES = {
    "dense float32": ("#000000", "-"),
    "scaled_sign, two_shot": ("#0072B2", "-"),
    "power_sgd(4)": ("#56B4E9", "--"),
    "DiLoCo, H = 30": ("#D55E00", "--"),
    "SparseLoCo, H = 30": ("#E69F00", "-"),
}
"""Colours that colour-blind readers can tell apart (Okabe and Ito), and dashes."""


def draw(records: list[dict[str, Any]], workers: int, path: pathlib.Path) -> None:
    """Writes the picture: means over the seeds, and a band from the least to the largest loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells, found = raw.cells(records), curves.curves(records)
    rates = [rate for rate in RATES if ("dense float32", workers, rate) in cells]
    figure, axes = plt.subplots(
        1,
        len(rates),
        figsize=(3.1 * len(rates), 3.7),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, rate in zip(axes, rates, strict=True):
        for name, (colour, dashes) in STYLES.items():
            runs = [one.losses for one in found if one.method == name]
            if not runs:
                continue
            step = cells[name, workers, rate].median
            seconds = [curves.EVERY * i * step for i in range(len(runs[0]))][1:]
            each = list(zip(*runs, strict=True))[1:]
            mean = [statistics.fmean(one) for one in each]
            axis.plot(seconds, mean, dashes, color=colour, label=name, linewidth=1.8)
            axis.fill_between(
                seconds, [min(one) for one in each], [max(one) for one in each],
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        axis.set(title=report.rate_name(rate), xlabel="seconds", xscale="log")
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axis.minorticks_off()
        axis.grid(True, which="major", color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss (nats a character)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)
