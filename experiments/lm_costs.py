"""What methods cost for the same loss: bytes, and predicted seconds for links of several speeds.

```
python -m experiments.lm_costs --runs=runs/lm,runs/lm_more --target=2.5 --step_time=0.1s
```

Reads folders that `experiments.lm` wrote, and trains nothing. Runs of one method that differ only
in the peak of cosine(PEAK) are one line, with the rate whose loss at the end is lowest. Seconds are
those of the planner's model: computation of the steps, and what the collectives of the compiled
program take on a link with the given bandwidth and latency; the codec's time is not in them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ef_optax.measure.planner import Link, Round, transfer_seconds
from ef_optax.measure.planner.links import seconds
from experiments import report, storage, study
from experiments.arguments import UsageError

FLAGS = flags.FlagValues()
_GIVEN: dict[str, Any] = {"flag_values": FLAGS}
flags.DEFINE_list("runs", [], "Folders that experiments.lm wrote.", **_GIVEN)
flags.DEFINE_string("out_dir", "runs/lm_costs", "Where costs.md and costs.png go.", **_GIVEN)
flags.DEFINE_float("target", None, "Held-out loss in nats to be reached.", **_GIVEN)
flags.DEFINE_string("step_time", "0.1s", "Computation of a step on one worker.", **_GIVEN)
flags.DEFINE_list("bandwidths", ["50mbit", "1gbit", "10gbit"], "Of a worker's link.", **_GIVEN)
flags.DEFINE_string("latency", "1ms", "Of one message one way.", **_GIVEN)

_PEAK = re.compile(r"cosine\(([0-9.e+-]+)\)")
_KINDS = {"reduce_scatter": "all_to_all", "broadcast": "permute"}


Amount = Callable[[str, int], float]
"""Of a collective, from its kind and the bytes of a worker's message."""


def size(kind: str, message: int) -> float:
    """The amount that is the message's own bytes."""
    del kind
    return message


class Method(NamedTuple):
    """One line: a method with the best of its rates.

    Attributes:
      name: the expression with PEAK in place of the rate.
      rate: the best one.
      tried: all of them.
      curves: (seeds, evaluations) losses in nats.
      steps: of the evaluations.
      wire: what a step sends.
      workers: how many send it.
    """

    name: str
    rate: str
    tried: list[str]
    curves: np.ndarray
    steps: np.ndarray
    wire: dict[str, Any]
    workers: int

    @property
    def bytes_per_step(self) -> float:
        return self.of_a_step(size)[1]

    def transfer(self, link: Link) -> float:
        """Seconds of a step on average."""
        return self.of_a_step(self.seconds(link))[1]

    def seconds(self, link: Link) -> Amount:
        """What a collective takes on a link."""

        def of(kind: str, message: int) -> float:
            one: Any = Round(_KINDS.get(kind, kind), message)
            return transfer_seconds([one], self.workers, link)

        return of

    def of_a_step(self, amount: Amount) -> tuple[float, float]:
        """The amount of all collectives of a dense step at the start, and of a later step.

        ``wire["dense_steps"]`` says how many steps at the start send everything, by a sum, and
        nothing else of what only some steps send.
        """
        period, dense = self.wire.get("period", 1), bool(self.wire.get("dense_steps"))
        first = later = 0.0
        for kind, message, sometimes in self.wire["rounds"]:
            one = amount(kind, message) / (period if sometimes else 1)
            whole = sometimes and dense
            first += one if not whole or kind == "reduce" else 0.0
            later += one if not whole or kind != "reduce" else 0.0
        return first, later

    def total(self, steps: Any, amount: Amount) -> Any:
        """The amount of all collectives of so many steps."""
        (first, later), dense = self.of_a_step(amount), self.wire.get("dense_steps", 0)
        return first * np.minimum(steps, dense) + later * np.maximum(steps - dense, 0)

    def steps_within(self, budget: float, amount: Amount, computation: float = 0.0) -> float:
        """How many steps fit into a budget, of which each also takes so much computation."""
        first, later = (one + computation for one in self.of_a_step(amount))
        dense = self.wire.get("dense_steps", 0)
        if budget < first * dense:
            return budget / first
        return dense + (budget - first * dense) / later

    def steps_to(self, target: float) -> float | None:
        """The step at which the mean curve reaches the target, between two evaluations."""
        mean = self.curves.mean(0)
        below = np.flatnonzero(mean <= target)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0:
            return float(self.steps[0])
        share = (mean[i - 1] - target) / (mean[i - 1] - mean[i])
        return float(self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1]))


def read(folders: list[Path]) -> list[Method]:
    """The methods of all folders, each with the best of its rates.

    Raises:
      OutputError: a folder holds no such runs.
      UsageError: the runs cannot be compared.
    """
    found: dict[str, dict[str, list[report.Rows]]] = {}
    wires: dict[str, dict[str, Any]] = {}
    given: dict[str, Any] = {}
    per_interval = 0
    for folder in folders:
        if not (folder / "config.json").exists():
            raise storage.OutputError(f"{folder}: experiments.lm has written nothing there")
        config = storage.read_json(folder / "config.json")
        if "text" not in config["flags"]:
            raise storage.OutputError(f"{folder}: these are no runs of experiments.lm")
        names = ("size", "steps", "eval_every", "batch_size", "length", "workers", "text")
        same = {name: config["flags"][name] for name in names}
        if given and same != given:
            differ = next(name for name in names if same[name] != given[name])
            raise UsageError(f"--runs: {folder} has another --{differ} than {folders[0]}")
        given, per_interval = same, config["about"]["steps_per_epoch"]
        wire = storage.read_json(folder / "wire.json")
        whole = given["steps"] // given["eval_every"]
        for method, runs in report.by_method(storage.read_rows(folder)).items():
            expression = config["about"]["expressions"].get(method, method)
            name = _PEAK.sub("cosine(PEAK)", expression)
            rate = ", ".join(_PEAK.findall(expression))
            complete = [run for run in runs if len(run) == whole]
            if complete:
                found.setdefault(name, {}).setdefault(rate, []).extend(complete)
                wires[name] = wire[method]
    methods = []
    for name, rates in found.items():
        best = min(rates, key=lambda rate: np.mean([run[-1]["test_loss"] for run in rates[rate]]))
        curves = np.array([[row["test_loss"] for row in run] for run in rates[best]])
        steps = per_interval * np.arange(1, curves.shape[1] + 1)
        tried = sorted(rates, key=float) if all(rates) else list(rates)
        methods.append(Method(name, best, tried, curves, steps, wires[name], given["workers"]))
    return methods


def table(methods: list[Method], target: float, links: dict[str, Link], step_time: float) -> str:
    """Loss after the same tokens; bytes and seconds until the same loss."""
    head = ["method", "rate (of)", "loss (nats)", "bytes/step", "factor", "MB to target"]
    head += [f"s to target, {name}" for name in links]
    dense = max(method.bytes_per_step for method in methods)
    rows = []
    for method in sorted(methods, key=lambda method: method.curves[:, -1].mean()):
        mean, deviation = report.mean_std(method.curves[:, -1].tolist())
        spread = f" ± {deviation:.3f} ({len(method.curves)})" if len(method.curves) > 1 else ""
        line = [f"`{method.name}`".replace("|", "\\|")]
        line += [f"{method.rate} ({len(method.tried)})", f"{mean:.3f}{spread}"]
        line += [f"{method.bytes_per_step:,.0f}", f"{dense / method.bytes_per_step:.0f}x"]
        steps = method.steps_to(target)
        if steps is None:
            line += ["never"] + [""] * len(links)
        else:
            line.append(f"{steps * method.bytes_per_step / 1e6:.2f}")
            line += [
                f"{steps * (step_time + method.transfer(link)):.1f}" for link in links.values()
            ]
        rows.append(line)
    return study.markdown(head, rows)


def picture(methods: list[Method]) -> Any:
    """The loss by step, and by megabytes that a worker has sent."""
    figure, axes = study.panels(1, 2, (11, 6.5), sharey=True)
    shown = sorted(methods, key=lambda method: method.curves[:, -1].mean())
    names = [method.name for method in shown]
    for method in shown:
        colour, dashes = report.style(method.name, names)
        mean = method.curves.mean(0)
        sent = method.steps * method.bytes_per_step / 1e6
        for axis, x in zip(axes[0], (method.steps, sent), strict=True):
            axis.plot(x, mean, color=colour, linestyle=dashes, lw=1.6, label=method.name)
    axes[0, 0].set(xlabel="step", ylabel="held-out loss (nats a token)")
    axes[0, 1].set(xlabel="megabytes sent by each worker (log scale)", xscale="log")
    finals = [method.curves[:, -1].mean() for method in shown]
    axes[0, 0].set_ylim(min(finals) - 0.05, max(finals) + 0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = 1 if len(labels) < 12 else 2
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=7
    )
    return figure


def run() -> None:
    """Writes the table and the picture."""
    if not FLAGS.runs or FLAGS.target is None:
        raise UsageError("give --runs=FOLDER,FOLDER and --target=NATS")
    try:
        links = {name: Link(name, FLAGS.latency) for name in FLAGS.bandwidths}
        step_time = seconds(FLAGS.step_time, "step_time")
    except ValueError as error:
        raise UsageError(str(error)) from None
    methods = read([Path(folder) for folder in FLAGS.runs])
    if not methods:
        raise storage.OutputError(f"{FLAGS.runs[0]}: no run is complete yet")
    text = table(methods, FLAGS.target, links, step_time)
    text += (
        f"\nTarget: {FLAGS.target} nats, from the mean curve of the rate with the lowest loss at "
        "the end (in brackets: how many were tried; after the loss: seeds). Seconds: "
        f"{FLAGS.step_time} of computation a step, {FLAGS.latency} latency, codec free.\n"
    )
    out_dir = storage.folder(FLAGS.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    storage.write_text(out_dir / "costs.md", text)
    study.save(picture(methods), out_dir / "costs.png")
    print(text)


def main(argv: list[str]) -> None:
    """Runs with these arguments; the first is the program's name."""
    study.command(FLAGS, __doc__ or "", argv, run)


if __name__ == "__main__":
    main(sys.argv)
