"""Processes that do what they are asked, all at the same time: a line of JSON in, one out."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from benchmarks.slow_network.network import Network

ROOT = pathlib.Path(__file__).parents[2]


class Failed(RuntimeError):
    """A worker ended; the message has the last lines of what it wrote."""


class Fleet:
    """One process for each worker of a network.

    Args:
      network: where they live.
      python: the interpreter.
      module: the program, which calls :func:`serve`.
      logs: a folder for what they write.
      arguments: of the program, after the worker's number, the number of workers, and the address
        of worker 0.
      environment: variables beside those of this process.
    """

    def __init__(
        self,
        network: Network,
        python: str,
        module: str,
        logs: pathlib.Path,
        arguments: list[str],
        environment: dict[str, str],
    ) -> None:
        addresses = network.addresses
        self._logs = [logs / f"{module.rpartition('.')[2]}_{i}.log" for i in range(len(addresses))]
        self._workers: list[subprocess.Popen[str]] = []
        for i, path in enumerate(self._logs):
            numbers = [str(i), str(len(addresses)), addresses[0]]
            command = [python, "-m", module, *numbers, *arguments]
            with path.open("w", encoding="utf-8") as log:
                self._workers.append(
                    subprocess.Popen(
                        network.inside(i, command),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        cwd=ROOT,
                        env={**os.environ, **environment},
                    )
                )

    def ask(self, **request: Any) -> list[Any]:
        """The answers of all workers, in their order.

        Raises:
          Failed: one of them ended.
        """
        for worker in self._workers:
            try:
                _pipe(worker.stdin).write(json.dumps(request) + "\n")
                _pipe(worker.stdin).flush()
            except BrokenPipeError:
                pass  # found below, with its reason
        answers = []
        for i, worker in enumerate(self._workers):
            line = _pipe(worker.stdout).readline()
            if not line:
                last = self._logs[i].read_text(encoding="utf-8", errors="replace")[-2000:]
                raise Failed(f"worker {i} ended at {request}:\n{last}")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
            _pipe(worker.stdin).close()
            _pipe(worker.stdout).close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def serve(answer: Any) -> None:
    """Answers requests until there are no more: ``answer(**request)`` gives what JSON can hold.

    What libraries print goes to standard error, so that answers are alone on standard output.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(**json.loads(line))) + "\n")
        out.flush()


def timed(step: Callable[[int], float], meet: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Takes one step, waits for the other workers, then times ``steps`` others.

    Returns:
      The seconds of each step, the last loss, and the bytes that this worker received and sent in
      all of them.
    """
    step(0)
    meet()
    before, seconds, loss = traffic(), [], 0.0
    for i in range(steps):
        begin = time.perf_counter()
        loss = step(i)
        seconds.append(time.perf_counter() - begin)
    moved = [after - b for after, b in zip(traffic(), before, strict=True)]
    return {"seconds": seconds, "loss": loss, "received": moved[0], "sent": moved[1]}


def traffic() -> tuple[int, int]:
    """Bytes that this worker's interface has received and sent, with the headers of packets."""
    folder = pathlib.Path("/sys/class/net/eth0/statistics")
    if not folder.exists():
        return 0, 0
    received, sent = ((folder / f"{way}_bytes").read_text() for way in ("rx", "tx"))
    return int(received), int(sent)
