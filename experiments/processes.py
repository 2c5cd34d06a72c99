"""The processes of a run: how they find each other, and how they agree to stop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

import ef_optax as ef
from experiments.arguments import UsageError

_PART = 1 << 20
"""Values of an array that a fingerprint takes at once."""


class Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a request; the second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        # Not through Python's buffers: the signal may have arrived while they were in use.
        os.write(2, f"\n{name}: finishing this epoch and saving; again to stop now\n".encode())

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes must call this together."""
        if jax.process_count() == 1:
            return self.asked
        return bool(np.any(multihost_utils.process_allgather(np.array(self.asked))))


def join(
    coordinator: str | None, count: int | None, number: int | None, seconds: int, silence: int = 30
) -> None:
    """Connects this process with the others: one per host.

    Args:
      coordinator: host:port of process 0; None where JAX finds it itself, as the other two.
      count: of processes.
      number: of this process.
      seconds: how long to wait for the others.
      silence: seconds after which a process that gives no sign of life counts as lost. Most are
        missed sooner, in a collective; this is for those that end while the others wait for a file
        or compile.

    Raises:
      UsageError: the numbers do not fit together, or the coordinator cannot be reached.
    """
    if count is not None and count < 1:
        raise UsageError(f"--num_processes={count} must be at least 1")
    if number is not None and not 0 <= number < (count or math.inf):
        raise UsageError(f"--process_id={number} must lie in 0 ... num_processes - 1")
    if coordinator and number:  # process 0 is the coordinator
        wait_for(coordinator, seconds)
    others = (
        f"--multihost: not all of the {count or 'other'} processes arrived within {seconds} s; "
        "start them all, or wait longer with --connect_timeout"
    )
    try:
        with ended_after(seconds, others):
            jax.distributed.initialize(
                coordinator,
                count,
                number,
                initialization_timeout=seconds + _MARGIN,
                heartbeat_timeout_seconds=silence,
            )
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--multihost: {str(error).splitlines()[0]}") from None
    # When process 0 is gone, JAX's client says so and aborts. The stacks of all threads, which
    # absl's handler would print below that line, add nothing to it.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """A checksum of the arrays' shapes and values; of large ones, of 16 parts of a million values.

    Two processes that read other files, or another version of one, have different ones.
    """
    found = 0
    for array in arrays:
        found = zlib.crc32(f"{array.dtype}{array.shape}".encode(), found)
        flat = array.reshape(-1)
        starts = np.linspace(0, max(0, len(flat) - _PART), 16).astype(int)
        for start in np.unique(starts):
            found = zlib.crc32(np.ascontiguousarray(flat[start : start + _PART]), found)
    return f"{found:08x}"


def agree(facts: dict[str, Any]) -> None:
    """Refuses processes that were started differently; all of them must call this together.

    Args:
      facts: what must be the same everywhere, such as flags, versions and a fingerprint of the
        data; two levels of names, and values that JSON can hold.

    Raises:
      UsageError: in every process, with the first difference.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    given = [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
    for number, other in enumerate(given):
        if said := difference(given[0], other):
            raise UsageError(
                f"--multihost: process {number} has {said[1]}, process 0 has {said[0]}; start all "
                "processes with the same flags, data, versions and folder"
            )


def difference(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, str] | None:
    """The first entry in which two processes differ, as each of them has it.

    >>> difference({"flags": {"ratio": 0.1}}, {"flags": {"ratio": 0.2}})
    ('--ratio=0.1', '--ratio=0.2')
    """
    for group, entries in first.items():
        others = second.get(group, {})
        for name in {**entries, **others}:
            values = entries.get(name), others.get(name)
            if values[0] != values[1]:
                dash, equals = ("--", "=") if group == "flags" else ("", " ")
                said = [f"{dash}{name}{equals}{value}" for value in values]
                return said[0], said[1]
    return None


def check_replicas(params: Any, where: str) -> None:
    """Refuses parameters of which not all workers have the same copy.

    Raises:
      UsageError: in every process, with the first of them.
    """
    if names := ef.parallel.differing_replicas(params):
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(
            f"{where}: the workers' copies of {names[0]}{rest} differ; some device or library "
            "computes something else than the others. Go on from an earlier checkpoint without it"
        )


def lost(error: Exception) -> bool:
    """Whether this error says that another process ended or cannot be reached."""
    if not jax.distributed.is_initialized():
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def lost_words(error: Exception) -> str:
    """What to say about it."""
    reason = " ".join(str(error).split())[:160]
    return (
        f"--multihost: another process ended or cannot be reached ({reason}); start all of them "
        "again with --resume"
    )


def end(error: str) -> NoReturn:
    """Ends this process with one line.

    If it is one of several, not through JAX's own end: that waits for all of them, so when one is
    gone the others stay for minutes and then end with a stack trace. Process 0 goes last, because
    the others end with a stack trace as soon as they miss it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    os.write(2, f"error: {error}\n".encode())
    if jax.process_index() == 0:
        time.sleep(_LAST_WORDS)
    os._exit(1)


_LAST_WORDS = 3
"""Seconds that the other processes have to say why they end."""

_MARGIN = 60
"""Seconds after our own time limit at which JAX's client would end the process."""


@contextlib.contextmanager
def ended_after(seconds: float, error: str) -> Iterator[None]:
    """Ends this process with one line if the block takes longer.

    JAX's client waits in C++, where no exception can reach it, and then ends the process itself,
    with a stack trace.
    """

    def end() -> None:
        os.write(2, f"error: {error}\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for(address: str, seconds: float) -> None:
    """Waits until something listens there; JAX itself would end the process with a stack trace.

    Raises:
      UsageError: nothing does in this time, or it is no address.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--coordinator={address} must be host:port")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=seconds).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UsageError(
                    f"--coordinator={address}: process 0 does not answer there ({error}); start it "
                    "first, or wait longer with --connect_timeout"
                ) from None
            time.sleep(0.2)
