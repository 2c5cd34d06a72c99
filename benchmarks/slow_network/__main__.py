"""Training steps over slow links, measured: processes in namespaces, links shaped by ``tc``.

``python -m benchmarks.slow_network``: a transformer on real text (``experiments.transformer``), one
process a worker over Gloo, Adam after the exchange. Each round visits every rate and times some
steps of every method there, so a slow minute slows them all; steps without an exchange are timed
between them. ``--torch_python`` names an interpreter with PyTorch, whose data parallelism then
takes part with a twin of the model. The raw records are JSON lines in ``--out``; a run that was
stopped goes on where it was. Needs root and iproute2; without them there are no slow links.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

from benchmarks import timing
from benchmarks.slow_network import curves, picture, records, report
from benchmarks.slow_network.fleet import Failed, Fleet
from benchmarks.slow_network.network import Network, missing, network
from ef_optax.measure.planner import bandwidth
from experiments import lines

FEW = 4
"""Bytes of the message of a probe, whose time is that of the latency."""

MANY = (1 << 18, 1 << 22)
"""Bytes of the messages of probes, whose times are those of the link and the software."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_network", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--workers", default="2,4", help="numbers of processes")
    made.add_argument("--rates", default="50mbit,200mbit,1gbit,5gbit,none", help="of the links")
    made.add_argument("--methods", help="names after bars; all of them by default")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=3, help="timed steps of a cell in a round")
    made.add_argument("--size", default="3M", help="of experiments.transformer.SIZES")
    made.add_argument("--rows", type=int, default=2, help="rows of text of a worker and step")
    made.add_argument("--torch_python", help="an interpreter with PyTorch and NumPy")
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out/slow"))
    made.add_argument("--curves", action="store_true", help="losses by step, after the cells")
    made.add_argument("--train", type=int, default=240, help="steps of --curves")
    made.add_argument("--live", help="a rate at which --curves checks itself")
    made.add_argument("--live_steps", type=int, default=30, help="of this check")
    made.add_argument("--picture", type=pathlib.Path, help="where to draw the losses by seconds")
    made.add_argument("--report", action="store_true", help="only the tables of the records")
    return made


class Bench:
    """A run for one number of workers.

    Args:
      net: where the workers live.
      flags: the command line.
      path: of the records.
    """

    def __init__(self, net: Network, flags: argparse.Namespace, path: pathlib.Path) -> None:
        self.net, self.flags, self.path = net, flags, path
        self.workers = len(net.addresses)
        self.done = {_key(record) for record in lines.read(path)}

    def cell(self, fleet: Fleet, method: str, prefix: str, rate: float | None, number: int) -> None:
        """Times a method once, unless the records have it."""
        from benchmarks.slow_network import methods

        name = prefix + method
        facts = {"workers": self.workers, "rate": rate, "round": number}
        record: dict[str, Any] = {"kind": "run", "method": name, **facts}
        if _key(record) in self.done:
            return
        found = methods.chosen().get(method)
        period = found.period if found else 1
        answers = fleet.ask(op="run", method=method, steps=max(period, self.flags.steps))
        steps = len(answers[0]["seconds"])
        record["seconds"] = records.step_seconds(answers, period)
        record["received"] = max(answer["received"] for answer in answers) / steps
        record["loss"] = answers[0]["loss"]
        self._write(record)

    def train(self, fleet: Fleet, method: str, rate: float | None, wanted: dict[str, Any]) -> None:
        """Trains with a method once, unless the records have it."""
        facts = {"workers": self.workers, "rate": rate}
        record: dict[str, Any] = {"kind": "curve", "method": method, **facts, **wanted}
        if _key(record) not in self.done:
            self.net.limit(rate)
            answers = fleet.ask(op="learn", method=method, every=curves.EVERY, **wanted)
            record["seconds"] = records.slowest(answers)
            record["losses"] = [
                statistics.fmean(one) for one in zip(*(a["losses"] for a in answers), strict=True)
            ]
            self._write(record)

    def complete(self, names: list[str], rates: list[float | None]) -> bool:
        """Whether the records have all that is asked for."""
        return all(
            _key({"kind": "run", "method": m, "workers": self.workers, "rate": r, "round": i})
            in self.done
            for m in names
            for r in rates
            for i in range(self.flags.rounds)
        )

    def probe(self, fleet: Fleet, rate: float | None, number: int) -> None:
        """Times collectives of a few bytes and of the sizes of messages."""
        sizes = (FEW * self.workers, *MANY)
        for kind in ("reduce", "gather", "all_to_all"):
            for size in sizes:
                facts = {"workers": self.workers, "rate": rate, "round": number, "bytes": size}
                record = {"kind": "probe", "method": kind, **facts}
                if _key(record) not in self.done:
                    answers = fleet.ask(
                        op="probe", kind=kind, size=size, times=3 if size in MANY else 7
                    )
                    record["seconds"] = [max(one) for one in zip(*answers, strict=True)]
                    self._write(record)

    def model(self, fleet: Fleet) -> None:
        """The shapes of the model, once."""
        record: dict[str, Any] = {"kind": "model"}
        if _key(record) not in self.done:
            record |= {"shapes": fleet.ask(op="shapes")[0]}
            lines.append(self.path, record)
            self.done.add(_key(record))

    def codecs(self, fleet: Fleet, names: list[str]) -> None:
        """What each codec costs while all workers use theirs."""
        for name in names:
            record: dict[str, Any] = {"kind": "codec", "method": name, "workers": self.workers}
            if _key(record) not in self.done:
                answers = fleet.ask(op="codec", method=name)
                record["seconds_per_value"] = [max(one) for one in zip(*answers, strict=True)]
                self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        lines.append(self.path, record)
        self.done.add(_key(record))
        print(_line(record), flush=True)


def _key(record: dict[str, Any]) -> str:
    names = ("kind", "method", "workers", "rate", "round", "bytes")
    names += ("learning_rate", "seed", "steps", "tuning")
    return json.dumps([record.get(name) for name in names])


def _line(record: dict[str, Any]) -> str:
    rate = record.get("rate")
    at = "" if record["kind"] == "codec" else f", {report.rate_name(rate)}"
    values = record.get("losses") or record.get("seconds") or record["seconds_per_value"]
    return f"{record['kind']} {record['method']}, {record['workers']} workers{at}: " + " ".join(
        f"{value:.3g}" for value in values
    )


def measure(flags: argparse.Namespace, workers: int, rates: list[float | None]) -> None:
    """All rounds for one number of workers."""
    from benchmarks.slow_network import methods

    names = flags.methods.split("|") if flags.methods else [*methods.chosen(), *methods.TORCH]
    ours = [name for name in names if name in methods.chosen()]
    theirs = [name for name in names if name in methods.TORCH] if flags.torch_python else []
    alone = [
        "compute",
        *([methods.LOCAL] if any(methods.chosen()[name].period > 1 for name in ours) else []),
    ]
    with network(workers, not missing()) as net:
        bench = Bench(net, flags, flags.out / "records.jsonl")
        if bench.complete([*alone, *ours, *theirs], rates):
            return
        with _ours(net, flags) as fleet:
            bench.model(fleet)
            bench.codecs(fleet, [name for name in ours if not methods.is_late(name)])
            for name in [*alone, *ours]:
                seconds = max(fleet.ask(op="prepare", method=name))
                print(f"prepared {name}, {workers} workers: {seconds:.1f} s", flush=True)
            twin = _twin(net, flags, theirs)
            try:
                for number in range(flags.rounds):
                    for rate in rates:
                        net.limit(rate)
                        bench.probe(fleet, rate, number)
                        for name in [*alone, *ours]:
                            bench.cell(fleet, name, "", rate, number)
                        if twin:
                            bench.cell(twin, "compute", "DDP, ", rate, number)
                            for name in theirs:
                                bench.cell(twin, name, "", rate, number)
                    net.limit(None)
            finally:
                if twin:
                    twin.close()


def train(flags: argparse.Namespace, workers: int) -> None:
    """The losses by step, and a check of them over slow links."""
    names = flags.methods.split("|") if flags.methods else curves.COMPARED
    with network(workers, not missing()) as net, _ours(net, flags) as fleet:
        bench = Bench(net, flags, flags.out / "records.jsonl")
        curves.learn(bench, fleet, names, flags.train)
        if flags.live:
            curves.live(bench, fleet, names, bandwidth(flags.live), flags.live_steps)


def _threads(net: Network) -> int:
    return max(1, (os.cpu_count() or 1) // len(net.addresses))


def _ours(net: Network, flags: argparse.Namespace) -> Fleet:
    # One device a process; a collective holds one thread of the pool, so it has more than one.
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "4",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false" if _threads(net) == 1 else "",
        "JAX_COMPILATION_CACHE_DIR": str(flags.out.absolute() / "programs"),
    }
    module = "benchmarks.slow_network.jax_worker"
    arguments = [flags.size, str(flags.rows)]
    return Fleet(net, sys.executable, module, flags.out, arguments, environment)


def _twin(net: Network, flags: argparse.Namespace, names: list[str]) -> Fleet | None:
    from benchmarks.slow_network import methods
    from experiments.transformer import SIZES

    if not names:
        return None
    environment = {
        "OMP_NUM_THREADS": str(_threads(net)),
        "GLOO_SOCKET_IFNAME": "lo" if net.owner is None else "eth0",
        "PYTHONPATH": "",
    }
    module = "benchmarks.slow_network.torch_worker"
    arguments = [*map(str, SIZES[flags.size]), str(flags.rows), str(methods.LENGTH)]
    fleet = Fleet(net, flags.torch_python, module, flags.out, arguments, environment)
    try:
        for name in ["compute", *names]:
            fleet.ask(op="prepare", method=name)
    except BaseException:
        fleet.close()
        raise
    return fleet


def checked(flags: argparse.Namespace) -> tuple[list[int], list[float | None]]:
    """The numbers of workers and the rates in bits per second; None is without a limit.

    Raises:
      ValueError: for a flag with a value that it cannot have.
    """
    from benchmarks.slow_network import methods
    from experiments.transformer import SIZES

    counts = [int(text) if text.isdecimal() else 0 for text in flags.workers.split(",")]
    if min(counts) < 2:
        raise ValueError(f"--workers={flags.workers}: give numbers of at least 2, as 2,4")
    for name in ("rounds", "steps", "rows", "train", "live_steps"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name}={getattr(flags, name)}: give a number of at least 1")
    if flags.size not in SIZES:
        raise ValueError(f"--size={flags.size}: choose of {', '.join(SIZES)}")
    known = [*methods.chosen(), *methods.TORCH]
    for name in flags.methods.split("|") if flags.methods else ():
        if name not in known:
            raise ValueError(f"--methods: {name!r} is none of {' | '.join(known)}")
    if flags.live:
        bandwidth(flags.live)
    return counts, [None if text == "none" else bandwidth(text) for text in flags.rates.split(",")]


def main() -> int:
    """Runs the benchmark from the command line."""
    made = parser()
    flags = made.parse_args()
    path = flags.out / "records.jsonl"
    if flags.report and not path.is_file():
        made.error(f"--out={flags.out} has no records.jsonl yet; run without --report first")
    try:
        counts, rates = checked(flags)
    except ValueError as error:
        made.error(str(error))
    flags.out.mkdir(parents=True, exist_ok=True)
    if not flags.report:
        if why := missing():
            print(f"{why}: the workers meet on the loopback interface, which has no limit")
            rates = [None]
        if not flags.torch_python:
            print("PyTorch is left out: --torch_python names an interpreter that has it")
        if not path.exists():
            about = {"hardware": timing.hardware(), "time": time.strftime("%Y-%m-%d %H:%M")}
            options = {name: str(value) for name, value in vars(flags).items()}
            lines.append(path, {"kind": "about", **about, "options": options})
        try:
            for workers in counts:
                if flags.curves:
                    train(flags, workers)
                else:
                    measure(flags, workers, rates)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on, and --report shows what is in {path}")
            return 130
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    found = lines.read(path)
    print(report.tables(found))
    if flags.picture:
        picture.draw(found, counts[0], flags.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
