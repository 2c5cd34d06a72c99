"""Processes killed at random moments: do the others stop, and does the run go on to the same bits?

``python -m benchmarks.faults``: the main job with ``--multihost`` over Gloo on this machine, with
two and with four processes. A trial starts it with ``--resume``, sends SIGKILL to one process,
and waits for the others; the next trial goes on where this one left the run. A run that comes to
its end must have the losses and accuracies of a run that nobody disturbed, to the last bit, and the
next trial begins another. The moment of a kill is uniform over the processor time that the
undisturbed run takes, so starting, compiling, training and saving all are hit.

The processes are forked from one that has imported the job. The records are JSON lines in
``--out``; the same command goes on where it was stopped. ``--report`` only prints their figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import random
import signal
import socket
import sys
import time
from typing import Any

from experiments import lines

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PJRT_NPROC": "16",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Of the processes: one device each, and programs that a restart finds compiled."""

JOB = ("--methods=ef_signsgd", "--lr=ef_signsgd=0.1", "--seeds=1", "--batch_size=64")
LIMIT = 60
"""Seconds within which the others must have ended, whatever they were doing."""

LONG = 3600
"""Seconds for a run that nobody disturbs."""

WORDS = (
    "error: --multihost: another process ended or cannot be reached",
    "error: --multihost: not all of the",
    "error: --coordinator=",
    "Terminating process because the JAX distributed service detected fatal errors. This most "
    "likely indicates that another task died",
)
"""What a process may say when it misses another: our three lines, and that of JAX's client."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--processes", default="2,4", help="numbers of processes")
    made.add_argument("--trials", type=int, default=20, help="kills for each number of processes")
    made.add_argument("--epochs", type=int, default=20, help="of a run")
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/out/faults"))
    made.add_argument("--report", action="store_true", help="only the figures of the records")
    return made


# ------------------------------------------------------------------------------ processes


@dataclasses.dataclass
class Team:
    """The processes of a run that are alive, and what the others left.

    Attributes:
      alive: process ids, by number.
      logs: what each of them writes.
      status: how those that ended did: an exit code, or minus a signal.
      processor: seconds of processor time of those that ended.
    """

    alive: dict[int, int]
    logs: list[pathlib.Path]
    status: dict[int, int] = dataclasses.field(default_factory=dict)
    processor: float = 0.0

    def poll(self) -> None:
        """Notes which processes have ended."""
        for number, pid in list(self.alive.items()):
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if ended:
                del self.alive[number]
                self.status[number] = os.waitstatus_to_exitcode(status)
                self.processor += used.ru_utime + used.ru_stime

    def used(self) -> float:
        """Seconds of processor time of all of them so far."""
        ticks = 0
        for pid in self.alive.values():
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return self.processor + ticks / os.sysconf("SC_CLK_TCK")

    def wait(self, seconds: float) -> float:
        """Waits until all have ended, ends those that do not, and returns how long it took."""
        begin = time.monotonic()
        self.poll()
        while self.alive and time.monotonic() - begin < seconds:
            time.sleep(0.01)
            self.poll()
        waited = time.monotonic() - begin
        self.kill()
        return waited

    def kill(self) -> None:
        """Ends all that are left."""
        for pid in self.alive.values():
            os.kill(pid, signal.SIGKILL)
        while self.alive:
            time.sleep(0.01)
            self.poll()

    def said(self, number: int) -> list[str]:
        """The lines that a process wrote."""
        return self.logs[number].read_text(encoding="utf-8", errors="replace").splitlines()


def start(count: int, folder: pathlib.Path, *arguments: str) -> Team:
    """Forks the processes of a run in a folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"process_{number}.log" for number in range(count)]
    shared = (f"--out_dir={folder / 'run'}", "--multihost", f"--coordinator={address}")
    team = Team({}, logs)
    for number in range(count):
        pid = os.fork()
        if not pid:
            ids = (f"--num_processes={count}", f"--process_id={number}")
            work([*JOB, *shared, *ids, f"--connect_timeout={LIMIT // 2}", *arguments], logs[number])
        team.alive[number] = pid
    return team


def work(arguments: list[str], log: pathlib.Path) -> None:
    """The main job in a forked process, which ends with it."""
    from absl import app

    from experiments import train

    out = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["experiments.train", *arguments]
    app.run(train.main)
    sys.exit(0)


def results(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run without the times."""
    from experiments import storage

    rows = storage.read_rows(folder / "run")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ------------------------------------------------------------------------------ trials


class Trials:
    """All trials with one number of processes.

    Args:
      count: of processes.
      flags: the command line.
    """

    def __init__(self, count: int, flags: argparse.Namespace) -> None:
        self.count, self.flags = count, flags
        self.path = flags.out / "records.jsonl"
        self.run = flags.out / f"killed_{count}"

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of this number of processes."""
        facts = {"kind": kind, "processes": self.count, "epochs": self.flags.epochs}
        return [r for r in lines.read(self.path) if facts.items() <= r.items()]

    def write(self, kind: str, **found: Any) -> None:
        """Adds a record."""
        facts = {"kind": kind, "processes": self.count, "epochs": self.flags.epochs}
        lines.append(self.path, facts | found)
        shown = {name: value for name, value in found.items() if name not in ("rows", "said")}
        print(f"{kind}, {self.count} processes: {shown}", flush=True)

    def undisturbed(self) -> dict[str, Any]:
        """The record of the run that nobody kills, which is made once."""
        if not self.records("whole"):
            folder = self.flags.out / f"whole_{self.count}"
            for epochs in ("--epochs=1", self._epochs):  # the first one compiles
                team = start(self.count, folder, epochs, "--overwrite")
                team.wait(LONG)
                if set(team.status.values()) != {0}:
                    sys.exit(f"error: the undisturbed run failed, see {folder}")
            self.write("whole", processor=team.processor, rows=results(folder))
        return self.records("whole")[0]

    @property
    def _epochs(self) -> str:
        return f"--epochs={self.flags.epochs}"

    def attempt(self, processor: float) -> None:
        """Goes on with the run; kills a process at a random moment if it has not ended by then."""
        victim, moment = random.randrange(self.count), random.uniform(0, processor)
        team = start(self.count, self.run, self._epochs, "--resume")
        try:
            while len(team.alive) == self.count and team.used() < moment:
                time.sleep(0.005)
                team.poll()
            if len(team.alive) < self.count:
                self.ended(team)
                return
            os.kill(team.alive[victim], signal.SIGKILL)
            waited = team.wait(LIMIT)
        finally:
            team.kill()
        others = [number for number in range(self.count) if number != victim]
        last = {number: _reason(team.said(number)) for number in others}
        complete = results(self.run) == self.records("whole")[0]["rows"]
        clear = all(last[i] if team.status[i] else complete for i in others)
        self.write(
            "trial",
            victim=victim,
            moment=round(moment / processor, 3),
            epochs_done=len(results(self.run)),
            waited=round(waited, 2),
            status=[team.status[number] for number in range(self.count)],
            clear=clear and not any("Traceback" in "".join(team.said(i)) for i in others),
            complete=complete,
            said={number: last[number] or team.said(number)[-8:] for number in others},
        )

    def ended(self, team: Team) -> None:
        """The run came to its end: is it the one that nobody disturbed?"""
        team.wait(LONG)
        same = results(self.run) == self.records("whole")[0]["rows"]
        status = [team.status[number] for number in range(self.count)]
        kills = len(self.records("trial")) - sum(r["kills"] for r in self.records("ended"))
        equal = same and set(status) == {0}
        self.write("ended", equal=equal, status=status, kills=kills)
        kept = self.run.with_name(f"{self.run.name}_{len(self.records('ended'))}")
        self.run.rename(kept)
        if not equal:
            sys.exit(f"error: {kept} is not as the undisturbed run")

    def measure(self) -> None:
        """All trials, and the last run to its end."""
        processor = self.undisturbed()["processor"]
        while len(self.records("trial")) < self.flags.trials:
            self.attempt(processor)
        if self.run.exists():
            team = start(self.count, self.run, self._epochs, "--resume")
            self.ended(team)


def _reason(lines: list[str]) -> str:
    """The line with which a process says that it misses another, if there is one."""
    said = [line for line in lines if any(words in line for words in WORDS)]
    return said[-1] if said else ""


def report(found: list[dict[str, Any]]) -> str:
    """The figures, a line for each number of processes."""
    lines = []
    for count in sorted({record["processes"] for record in found}):
        own = [record for record in found if record["processes"] == count]
        trials = [record for record in own if record["kind"] == "trial"]
        ended = [record for record in own if record["kind"] == "ended"]
        if not trials:
            continue
        waits = sorted(record["waited"] for record in trials)
        stopped = sum(record["clear"] and record["waited"] < LIMIT for record in trials)
        middle, longest = waits[len(waits) // 2], waits[-1]
        equal, kills = sum(r["equal"] for r in ended), sum(r["kills"] for r in ended)
        lines.append(
            f"{count} processes: after {stopped} of {len(trials)} kills the others ended with a "
            f"line that says why, or had all results, within {LIMIT} s (median {middle:.1f} s, "
            f"longest {longest:.1f} s); {equal} of {len(ended)} runs, killed {kills} times in all, "
            "ended with the bits of the undisturbed run"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the trials from the command line."""
    made = parser()
    flags = made.parse_args()
    flags.out = flags.out.absolute()
    path = flags.out / "records.jsonl"
    counts = [int(text) if text.isdecimal() else 0 for text in flags.processes.split(",")]
    if min(counts) < 2:
        made.error(f"--processes={flags.processes}: give numbers of at least 2, as 2,4")
    for name in ("trials", "epochs"):
        if getattr(flags, name) < 1:
            made.error(f"--{name}={getattr(flags, name)}: give a number of at least 1")
    if flags.report and not path.is_file():
        made.error(f"--out={flags.out} has no records.jsonl yet; run without --report first")
    if not flags.report:
        flags.out.mkdir(parents=True, exist_ok=True)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(flags.out / "programs")}
        os.environ.update(ENVIRONMENT | cache)  # JAX reads them when it is imported
        from experiments import data, train  # noqa: F401  (for all processes, once)

        data.load("digits", None)
        for count in counts:
            Trials(count, flags).measure()
    print(report(lines.read(path)))


if __name__ == "__main__":
    main()
