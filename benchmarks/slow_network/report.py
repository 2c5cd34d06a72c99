"""The tables of the slow network: measured, against the limit, and beside the planner's answer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.slow_network import curves
from benchmarks.slow_network import records as raw
from benchmarks.slow_network.predict import Model

DENSE = "dense float32"
KNOWN = {"the bandwidth": Model.seconds, "measured collectives": Model.probed_seconds}
"""What the planner is given of a link."""


def rate_name(rate: float | None) -> str:
    """A rate in words."""
    if rate is None:
        return "no limit"
    return f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables(records: list[dict[str, Any]]) -> str:
    """All tables of all numbers of workers."""
    cells = raw.cells(records)
    counts = sorted({workers for _, workers, _ in cells})
    text = []
    for workers in counts:
        model = Model(records, workers)
        text.append(
            f"### {workers} workers\n\n{measured(cells, model)}\n\n{predicted(cells, model)}"
        )
    for workers in counts:
        if any(record["kind"] == "curve" and record["workers"] == workers for record in records):
            text += [by_seconds(records, workers), live(records, workers)]
    return "\n\n".join([*text, errors(records, counts)])


def _rates(cells: dict[Any, raw.Cell], workers: int) -> list[float | None]:
    found = {rate for _, count, rate in cells if count == workers}
    return sorted(found, key=lambda rate: rate or float("inf"))


def _names(cells: dict[Any, raw.Cell], workers: int) -> list[str]:
    return list(dict.fromkeys(name for name, count, _ in cells if count == workers))


def measured(cells: dict[Any, raw.Cell], model: Model) -> str:
    """Seconds of a step; times its limit; how many times as fast as our own dense step."""
    rates = _rates(cells, model.workers)
    rows = []
    for name in _names(cells, model.workers):
        row = [name]
        for rate in rates:
            cell = cells.get((name, model.workers, rate))
            if cell is None:
                row.append("")
                continue
            text = f"{cell.median:.3g}"
            limit = model.limit(cell)
            dense = cells.get((DENSE, model.workers, rate))
            if limit is not None and "compute" not in name:
                text += f" ({cell.median / limit:.2f} limit"
                text += f", {dense.median / cell.median:.3g}x)" if dense else ")"
            row.append(text)
        rows.append(row)
    head = ["seconds of a step (by its limit, x dense)", *map(rate_name, rates)]
    return table(head, rows)


def predicted(cells: dict[Any, raw.Cell], model: Model) -> str:
    """The planner's seconds, from the bandwidth and from collectives, beside the measured ones."""
    rates = _rates(cells, model.workers)
    rows = []
    for name in _names(cells, model.workers):
        if name not in model.methods:
            continue
        row = [name]
        for rate in rates:
            cell = cells.get((name, model.workers, rate))
            if cell is None:
                row.append("")
                continue
            planned = model.seconds(name, rate), model.probed_seconds(name, rate)
            row.append(" / ".join(f"{one:.3g}" for one in (*planned, cell.median)))
        rows.append(row)
    return table(["bandwidth / collectives / measured", *map(rate_name, rates)], rows)


LOSSES = (2.8, 2.5, 2.3)
"""Held-out losses to which :func:`by_seconds` counts."""


def by_seconds(records: list[dict[str, Any]], workers: int) -> str:
    """Mean seconds until a loss over the seeds, and a dash if some seed never reached it."""
    cells, found = raw.cells(records), curves.curves(records)
    rates = [rate for rate in _rates(cells, workers) if rate is not None]
    rows = []
    for name in dict.fromkeys(one.method for one in found):
        runs = [one for one in found if one.method == name]
        last = [one.losses[-1] for one in runs]
        row = [name, f"{runs[0].learning_rate:g}", f"{statistics.fmean(last):.2f}"]
        for loss in LOSSES:
            steps = [one.steps_to(loss) for one in runs]
            row.append(_mean(steps, "{:.0f}"))
            for rate in rates[:3]:
                each = curves.seconds_to(runs, cells, workers, rate, loss)[name]
                row.append(_mean(each, "{:.3g}"))
        rows.append(row)
    head = ["", "rate", "last loss"]
    for loss in LOSSES:
        head += [f"steps to {loss}", *(f"s, {rate_name(rate)}" for rate in rates[:3])]
    return table(head, rows)


def live(records: list[dict[str, Any]], workers: int) -> str:
    """Losses and seconds over slow links beside those that :func:`by_seconds` puts together."""
    cells, rows = raw.cells(records), []
    for record in records:
        if record["kind"] != "curve" or record["rate"] is None or record["workers"] != workers:
            continue
        (alone,) = (
            one
            for one in curves.curves(records)
            if (one.method, one.seed) == (record["method"], record["seed"])
        )
        count = len(record["losses"])
        cell = cells[record["method"], workers, record["rate"]]
        rows.append(
            [
                f"{record['method']}, {rate_name(record['rate'])}",
                " ".join(f"{x:.4f}" for x in record["losses"]),
                " ".join(f"{x:.4f}" for x in alone.losses[:count]),
                f"{sum(record['seconds']):.1f}",
                f"{record['steps'] * cell.median:.1f}",
            ]
        )
    return table(["", "losses", "without a limit", "seconds", "put together"], rows)


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if len(known) == len(values) else "-"


def errors(records: list[dict[str, Any]], counts: list[int]) -> str:
    """How far the planner is off: the median over all cells, and the worst cell."""
    cells, text = raw.cells(records), []
    for given, seconds in KNOWN.items():
        found = []
        for workers in counts:
            model = Model(records, workers)
            for (name, count, rate), cell in cells.items():
                if count == workers and name in model.methods:
                    found.append((seconds(model, name, rate) / cell.median, name, count, rate))
        if not found:
            continue
        middle = statistics.median(abs(ratio - 1) for ratio, *_ in found)
        ratio, name, count, rate = max(found, key=lambda one: max(one[0], 1 / one[0]))
        text.append(
            f"From {given} the planner is off by {middle:.1%} in the median of {len(found)} cells; "
            f"the worst is {name} with {count} workers at {rate_name(rate)}, planned / measured "
            f"{ratio:.2f}."
        )
    return "\n".join(text)
