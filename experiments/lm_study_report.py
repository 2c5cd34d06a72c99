"""The records of `experiments.lm_study`, its tables and its picture; nothing is trained here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ef_optax.measure.planner import Link
from ef_optax.measure.planner.links import seconds
from experiments import lines, report, storage, study
from experiments.lm_costs import Method, size

LINKS = ("50mbit", "200mbit", "1gbit", "10gbit")
LATENCY = "1ms"
SMOOTHED = 10
"""Steps of one value of the training losses in the records."""

DENSE_STEPS = 20
"""The budgets of the tables are what so many steps of dense AdamW take."""

OF_MUON = re.compile("Muon|MuLoCo|Dion")
"""The methods whose steps are orthogonal, which are compared with Muon and not with AdamW."""

PAIRS = ("no memory", "EF14", "EF21", "EF21-SGDM")
SHOWN = {
    "AdamW": (study.BLACK, "-"),
    "Muon": (study.BLACK, "--"),
    "AdamW, top-k, EF14": (study.BLUE, "-"),
    "Muon, top-k, EF14": (study.BLUE, "--"),
    "AdamW, top-k, EF21-SGDM": (study.VERMILION, "-"),
    "Muon, top-k, EF21-SGDM": (study.VERMILION, "--"),
    "AdamW, top-k, no memory": (study.PURPLE, ":"),
    "Muon, top-k, no memory": (study.PURPLE, "-."),
    "DiLoCo, H = 15": (study.ORANGE, "-."),
    "SparseLoCo 3%, H = 15": (study.GREEN, "-."),
    "DeMo": (study.SKY, "-"),
    "MuLoCo, H = 15": (study.GREEN, "--"),
}
"""The methods in the picture, which tells them apart by dashes as well as by colours."""


class Records:
    """What was trained: one JSON object a line, appended and never changed.

    Attributes:
      about: by setting (size and steps), what is common to all runs.
      wire: by (setting, method), the bytes of a step as `experiments.programs` counts them.
      runs: by (setting, method, rate, seed), the losses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, dict[str, Any]] = {}
        self.wire: dict[tuple[str, str], dict[str, Any]] = {}
        self.runs: dict[tuple[str, str, float, int], dict[str, Any]] = {}
        try:
            for row in lines.read(path):
                self._take(row)
        except KeyError as error:
            raise storage.OutputError(f"{path}: a line has no {error}") from None

    def add(self, row: dict[str, Any]) -> None:
        """Appends a line to the file."""
        lines.append(self.path, row)
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        if "about" in row:
            self.about[row["setting"]] = row["about"]
        elif "wire" in row:
            self.wire[row["setting"], row["method"]] = row["wire"]
        else:
            self.runs[row["setting"], row["method"], row["rate"], row["seed"]] = row

    def loss(self, setting: str, method: str, rate: float, seed: int) -> float | None:
        """The held-out loss at the end of a run; None if there is no such run."""
        run = self.runs.get((setting, method, rate, seed))
        return None if run is None else run["held_out"][-1]

    def rates(self, setting: str, method: str) -> list[float]:
        """The rates that were tried with seed 0."""
        return sorted(k[2] for k in self.runs if k[:2] == (setting, method) and k[3] == 0)

    def best_rate(self, setting: str, method: str) -> float | None:
        """The rate whose run with seed 0 ends lowest."""
        rates = self.rates(setting, method)
        return min(rates, key=lambda rate: self.loss(setting, method, rate, 0) or 0.0, default=None)

    def best(self, setting: str, method: str) -> list[dict[str, Any]]:
        """The runs of all seeds with the best rate."""
        rate = self.best_rate(setting, method)
        return [run for key, run in sorted(self.runs.items()) if key[:3] == (setting, method, rate)]

    def methods(self, setting: str) -> list[Method]:
        """All methods of a setting that have a run, with their training losses as curves."""
        found = []
        names = dict.fromkeys(key[1] for key in self.runs if key[0] == setting)
        workers = 8
        for name in names:
            runs = self.best(setting, name)
            curves = np.array([run["train"] for run in runs])
            steps = SMOOTHED * (np.arange(curves.shape[1]) + 0.5)
            rate, tried = f"{runs[0]['rate']:g}", [f"{r:g}" for r in self.rates(setting, name)]
            wire = self.wire[setting, name]
            found.append(Method(name, rate, tried, curves, steps, wire, workers))
        return found


########################################################################################
# Tables
########################################################################################


def finals(records: Records, setting: str, method: str) -> list[float]:
    """Held-out losses at the end, by seed."""
    return [run["held_out"][-1] for run in records.best(setting, method)]


def shown(losses: Sequence[float], less: float = 0.0) -> str:
    """Mean and deviation of several seeds, or the loss of one."""
    if max(losses) > 1e9:
        return "lost"
    mean, deviation = report.mean_std(list(losses))
    sign = "+" if less else ""
    spread = f" ± {deviation:.3f}" if len(losses) > 1 else ""
    return f"{mean - less:{sign}.3f}{spread}"


def at(method: Method, step: float) -> float:
    """The smoothed training loss at a step, for budgets that no evaluation falls on."""
    return float(np.interp(step, method.steps, method.curves.mean(0)))


def main_table(records: Records, setting: str) -> str:
    """The loss after the same tokens, beside what was sent for it."""
    dense = {name: np.mean(finals(records, setting, name)) for name in ("AdamW", "Muon")}
    head = ["method", "rate (tried)", "seeds", "held-out loss", "gap", "bytes/step", "factor", "MB"]
    rows, methods = [], records.methods(setting)
    last = records.about[setting]["steps"]
    whole = records.about[setting]["dense_bytes"]
    for method in sorted(methods, key=lambda m: np.mean(finals(records, setting, m.name))):
        losses = finals(records, setting, method.name)
        sent = method.total(last, size) / last
        compared = dense["Muon" if OF_MUON.search(method.name) else "AdamW"]
        rows.append(
            [method.name, f"{method.rate} ({len(method.tried)})", str(len(losses))]
            + [shown(losses), shown([np.mean(losses)], compared), f"{sent:,.0f}"]
            + [f"{whole / sent:.0f}x", f"{sent * last / 1e6:.2f}"]
        )
    return study.markdown(head, rows)


def memory_table(records: Records, setting: str) -> str:
    """The same bits without a memory and with three of them, before Adam and before Muon."""
    head = ["before", "compressor", "dense", *PAIRS]
    rows = []
    for optimizer in ("AdamW", "Muon"):
        for compressor in ("top-k", "sign"):
            names = [optimizer, *(f"{optimizer}, {compressor}, {memory}" for memory in PAIRS)]
            losses = [finals(records, setting, name) for name in names]
            if any(losses[1:]):
                rows.append([optimizer, compressor, *(shown(x) if x else "" for x in losses)])
    return study.markdown(head, rows)


def budget_table(records: Records, setting: str, step_time: float) -> str:
    """The training loss when the budget of some dense steps is used up: bytes, then seconds."""
    methods = {method.name: method for method in records.methods(setting)}
    dense, last = methods["AdamW"], records.about[setting]["steps"]
    links = {name: Link(name, LATENCY) for name in LINKS}

    megabytes = DENSE_STEPS * dense.bytes_per_step / 1e6
    budgets: list[tuple[str, Callable[[Method], float]]] = [
        (f"{megabytes:.1f} MB", lambda m: m.steps_within(1e6 * megabytes, size)),
    ]
    for name, link in links.items():
        total = DENSE_STEPS * (step_time + dense.transfer(link))
        label = f"{total:.2g} s at {name}"
        budgets.append(
            (label, lambda m, k=link, t=total: m.steps_within(t, m.seconds(k), step_time))
        )
    rows = []
    for method in methods.values():
        if max(finals(records, setting, method.name)) > 1e9:
            continue
        cells = []
        for _, steps_of in budgets:
            steps = min(steps_of(method), last)
            cells.append(f"{at(method, steps):.2f} ({steps:.0f})")
        rows.append([method.name, *cells])
    return study.markdown(["method", *(label for label, _ in budgets)], rows)


def setting_table(records: Records) -> str:
    """Gaps to dense AdamW for every size and number of steps that have it."""
    settings = [setting for setting in records.about if finals(records, setting, "AdamW")]
    dense = {s: float(np.mean(finals(records, s, "AdamW"))) for s in settings}
    rows = []
    for method in dict.fromkeys(key[1] for key in records.runs):
        cells = []
        for setting in settings:
            losses = finals(records, setting, method)
            if not losses or method == "AdamW":
                cells.append(shown(losses) if losses else "")
            else:
                cells.append(shown([np.mean(losses)], dense[setting]))
        if sum(map(bool, cells)) > 1:
            rows.append([method, *cells])
    abouts = [records.about[setting] for setting in settings]
    heads = [f"{x['parameters']:,} parameters, {x['steps']:,} steps" for x in abouts]
    return study.markdown(["method", *heads], rows)


########################################################################################
# Picture and files
########################################################################################


def picture(records: Records, setting: str) -> Any:
    """Training loss by tokens, and by megabytes that a worker has sent."""
    figure, axes = study.panels(1, 2, (9.5, 4.4), sharey=True)
    methods = {method.name: method for method in records.methods(setting)}
    tokens = records.about[setting]["tokens_per_step"]
    for name, (colour, dashes) in SHOWN.items():
        if name not in methods:
            continue
        method = methods[name]
        mean, low, high = (f(method.curves, axis=0) for f in (np.mean, np.min, np.max))
        sent = method.total(method.steps, size) / 1e6
        for axis, x in zip(axes[0], (method.steps * tokens / 1e3, sent), strict=True):
            axis.plot(x, mean, color=colour, linestyle=dashes, lw=1.7, label=name)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes[0, 0].set(xlabel="thousand tokens", ylabel="training loss (nats a character)")
    axes[0, 1].set(xlabel="megabytes sent by each worker (log scale)", xscale="log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def tables(records: Records, step_time: str) -> dict[str, str]:
    """The tables by their names, as the documentation shows them."""
    setting, time = "0.2M", seconds(step_time, "step_time")
    if (setting, "AdamW") not in records.wire or (setting, "Muon") not in records.wire:
        raise storage.OutputError(f"{records.path}: dense AdamW and Muon are not there yet")
    found = {
        "The same tokens": main_table(records, setting),
        "The same bits, with and without a memory": memory_table(records, setting),
        f"The budget of {DENSE_STEPS} dense steps": budget_table(records, setting, time),
    }
    several = len(records.about) > 1
    return found | ({"Sizes and lengths": setting_table(records)} if several else {})


def write(records: Records, out_dir: Path, step_time: str) -> str:
    """Writes study.md and study.png; returns the text."""
    text = ""
    for name, table in tables(records, step_time).items():
        text += f"## {name}\n\n{table}\n"
    about = records.about["0.2M"]
    text += (
        f"{about['parameters']:,} parameters, {about['hardware']}; gaps are to the uncompressed "
        "optimizer of the same kind; in brackets the steps that a budget allows, at most "
        f"{about['steps']}. Seconds: {step_time} of computation a step, {LATENCY} latency, codec "
        "free.\n"
    )
    storage.write_text(out_dir / "study.md", text)
    study.save(picture(records, "0.2M"), out_dir / "study.png")
    return text
