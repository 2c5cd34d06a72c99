"""Interleaved timing: every contender runs once a round, so a slow minute slows them all."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of doing a step.

    Attributes:
      name: what the table calls it.
      prepare: makes fresh arguments; not timed.
      run: does the step on them and waits for the result; timed.
      repeats: how many steps ``run`` does; times are divided by it.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round, by the clock and of all cores together."""

    seconds: tuple[float, ...]
    processor: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Fastest round: the cost of the step when nothing else runs on the machine."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile: the spread."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def measure(contenders: list[Contender], rounds: int, budget: float) -> dict[str, Timing]:
    """Times all contenders, one run each a round.

    Before each timed run the same contender runs once untimed, so that none finds the cores
    asleep, or caches and threads as another contender left them. Results are held until the
    clock is read: returning 100 MB to the system takes longer than filling them.

    Args:
      contenders: what to time; each runs once before, untimed.
      rounds: the largest number of rounds.
      budget: seconds after which a contender with at least three rounds stops.

    Returns:
      The timing of each contender by name.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    processor: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run(contender.prepare())
    for _ in range(rounds):
        for contender in contenders:
            taken = seconds[contender.name]
            if len(taken) >= 3 and sum(taken) > budget:
                continue
            before, arguments = contender.prepare(), contender.prepare()
            contender.run(before)
            begun, start = time.process_time(), time.perf_counter()
            result = contender.run(arguments)
            taken.append((time.perf_counter() - start) / contender.repeats)
            processor[contender.name].append((time.process_time() - begun) / contender.repeats)
            del result, arguments  # after the clock is read: returning memory takes time
    return {name: Timing(tuple(x), tuple(processor[name])) for name, x in seconds.items()}


def lines(timings: dict[str, Timing]) -> str:
    """One line for each contender: median, quartiles and fastest round, in milliseconds."""
    text = []
    for name, taken in timings.items():
        low, high = (1e3 * quartile for quartile in taken.quartiles)
        middle, best = 1e3 * taken.median, 1e3 * taken.best
        text.append(f"{name:28} {middle:10.2f} ms  {low:.2f} - {high:.2f}  best {best:.2f}")
    return "\n".join(text)


def one_device() -> None:
    """Undoes the virtual devices of the tests: one worker is timed, with all cores.

    PyTorch's threads go to sleep when they have nothing to do, instead of spinning on the cores
    that the next contender needs. Call it before anything is computed.
    """
    os.environ.pop("PJRT_NPROC", None)
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0")
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join(kept)


def hardware() -> str:
    """The processor's name, the number of cores and their load."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{model}, {os.cpu_count()} cores, load average {load:.1f} at the start"
