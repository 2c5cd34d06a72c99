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
import sys
import time
from typing import Any

from benchmarks import timing
from benchmarks.slow_network import records, report
from benchmarks.slow_network.fleet import Failed, Fleet
from benchmarks.slow_network.network import Network, missing, network
from ef_optax.measure.planner import bandwidth

FEW = 4
"""Bytes of the message of a probe, whose time is that of the latency."""


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
        self.done = {_key(record) for record in records.read(path)}

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
        """Times collectives of a few bytes and, without a limit, of a model's size."""
        sizes = [FEW * self.workers] + [1 << 22] * (rate is None)
        for kind in ("reduce", "gather", "all_to_all"):
            for size in sizes:
                facts = {"workers": self.workers, "rate": rate, "round": number, "bytes": size}
                record = {"kind": "probe", "method": kind, **facts}
                if _key(record) not in self.done:
                    answers = fleet.ask(op="probe", kind=kind, size=size, times=7)
                    record["seconds"] = [max(one) for one in zip(*answers, strict=True)]
                    self._write(record)

    def model(self, fleet: Fleet) -> None:
        """The shapes of the model, once."""
        record: dict[str, Any] = {"kind": "model"}
        if _key(record) not in self.done:
            record |= {"shapes": fleet.ask(op="shapes")[0]}
            records.append(self.path, record)
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
        records.append(self.path, record)
        self.done.add(_key(record))
        print(_line(record), flush=True)


def _key(record: dict[str, Any]) -> str:
    names = ("kind", "method", "workers", "rate", "round", "bytes")
    return json.dumps([record.get(name) for name in names])


def _line(record: dict[str, Any]) -> str:
    rate = record.get("rate")
    at = "" if record["kind"] == "codec" else f", {report.rate_name(rate)}"
    values = record.get("seconds") or record["seconds_per_value"]
    return f"{record['kind']} {record['method']}, {record['workers']} workers{at}: " + " ".join(
        f"{value:.3g}" for value in values
    )


def measure(flags: argparse.Namespace, workers: int, rates: list[float | None]) -> None:
    """All rounds for one number of workers."""
    from benchmarks.slow_network import methods
    from experiments.transformer import SIZES

    names = flags.methods.split("|") if flags.methods else [*methods.chosen(), *methods.TORCH]
    ours = [name for name in names if name in methods.chosen()]
    theirs = [name for name in names if name in methods.TORCH] if flags.torch_python else []
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    # One device a process; a collective holds one thread of the pool, so it has more than one.
    jax_flags = "--xla_cpu_multi_thread_eigen=false" if threads == "1" else ""
    cache = str(flags.out.absolute() / "programs")
    jax_environment = {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "4",
        "XLA_FLAGS": jax_flags,
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    torch_environment = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "eth0"}
    with network(workers, not missing()) as net:
        if net.owner is None:
            torch_environment["GLOO_SOCKET_IFNAME"] = "lo"
        bench = Bench(net, flags, flags.out / "records.jsonl")
        if bench.complete(["compute", *ours, *theirs], rates):
            return
        here = "benchmarks.slow_network."
        arguments = [flags.size, str(flags.rows)]
        fleet = Fleet(
            net, sys.executable, here + "jax_worker", flags.out, arguments, jax_environment
        )
        with fleet:
            bench.model(fleet)
            bench.codecs(fleet, ours)
            for name in ["compute", *ours]:
                seconds = max(fleet.ask(op="prepare", method=name))
                print(f"prepared {name}, {workers} workers: {seconds:.1f} s", flush=True)
            arguments = [*map(str, SIZES[flags.size]), str(flags.rows), str(methods.LENGTH)]
            twin = _twin(net, flags, here + "torch_worker", arguments, torch_environment, theirs)
            try:
                for number in range(flags.rounds):
                    for rate in rates:
                        net.limit(rate)
                        bench.probe(fleet, rate, number)
                        for name in ["compute", *ours]:
                            bench.cell(fleet, name, "", rate, number)
                        if twin:
                            bench.cell(twin, "compute", "DDP, ", rate, number)
                            for name in theirs:
                                bench.cell(twin, name, "", rate, number)
                    net.limit(None)
            finally:
                if twin:
                    twin.close()


def _twin(
    net: Network,
    flags: argparse.Namespace,
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    names: list[str],
) -> Fleet | None:
    if not names:
        return None
    environment = {**environment, "PYTHONPATH": ""}
    fleet = Fleet(net, flags.torch_python, module, flags.out, arguments, environment)
    try:
        for name in ["compute", *names]:
            fleet.ask(op="prepare", method=name)
    except BaseException:
        fleet.close()
        raise
    return fleet


def main() -> int:
    """Runs the benchmark from the command line."""
    flags = parser().parse_args()
    path = flags.out / "records.jsonl"
    flags.out.mkdir(parents=True, exist_ok=True)
    if not flags.report:
        rates = [None if text == "none" else bandwidth(text) for text in flags.rates.split(",")]
        if why := missing():
            print(f"{why}: the workers meet on the loopback interface, which has no limit")
            rates = [None]
        if not flags.torch_python:
            print("PyTorch is left out: --torch_python names an interpreter that has it")
        if not path.exists():
            about = {"hardware": timing.hardware(), "time": time.strftime("%Y-%m-%d %H:%M")}
            options = {name: str(value) for name, value in vars(flags).items()}
            records.append(path, {"kind": "about", **about, "options": options})
        try:
            for workers in map(int, flags.workers.split(",")):
                measure(flags, workers, rates)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on, and --report shows what is in {path}")
            return 130
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(report.tables(records.read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
