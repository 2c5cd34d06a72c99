"""A pytest plugin that writes the seconds and outcomes of each test file.

Loaded by ``-p benchmarks.record.plugin``. Every process that runs tests (each worker of xdist)
writes a file of its own into the directory ``EF_RECORD_DIR``; ``suite.merged`` adds them up. It
must not import JAX, whose settings are those of the tests.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

DIRECTORY = "EF_RECORD_DIR"
SLOW_TEST = 1.0
"""Tests that take this many processor seconds are listed one by one."""


class Clock:
    """Wall and processor seconds since it was made, with those of child processes."""

    def __init__(self) -> None:
        self.start = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Wall and processor time, the latter with that of children which have ended."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime

    def elapsed(self) -> tuple[float, float]:
        """Wall and processor seconds."""
        wall, cpu = self.now()
        return wall - self.start[0], cpu - self.start[1]


class Recorder:
    """Adds up what each test file takes in this process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: dict[str, collections.Counter[str]] = {}
        self.slow: dict[str, float] = {}

    def of(self, nodeid: str) -> collections.Counter[str]:
        """The sums of the file of a test."""
        return self.files.setdefault(nodeid.split("::")[0], collections.Counter())

    def add(self, nodeid: str, part: str, clock: Clock) -> None:
        """Adds what a part of the work for a file took."""
        wall, cpu = clock.elapsed()
        self.of(nodeid).update({f"{part}wall_seconds": wall, f"{part}cpu_seconds": cpu})

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """Imports of the test modules are counted apart: every process makes them."""
        clock = Clock()
        report = yield
        if isinstance(collector, pytest.Module):
            self.add(collector.nodeid, "collect_", clock)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """One test with its fixtures; one of the session counts for the test that asks first."""
        clock = Clock()
        done = yield
        self.add(item.nodeid, "", clock)
        cpu = clock.elapsed()[1]
        if cpu >= SLOW_TEST:
            self.slow[item.nodeid] = cpu
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Counts the outcome: that of the call, or of the setup where there was no call."""
        report: Any = yield
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            expected = "x" if hasattr(report, "wasxfail") else ""
            self.of(item.nodeid).update({expected + report.outcome: 1})
        return report

    def pytest_sessionfinish(self) -> None:
        """Writes what this process ran; the controller of xdist runs nothing."""
        if self.files:
            path = pathlib.Path(os.environ[DIRECTORY]) / f"{self.name}-{os.getpid()}.json"
            path.write_text(json.dumps({"files": self.files, "slow": self.slow}), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Starts to record where it was asked for."""
    if DIRECTORY in os.environ:
        worker = getattr(config, "workerinput", {"workerid": "main"})["workerid"]
        config.pluginmanager.register(Recorder(worker), "ef_record")
