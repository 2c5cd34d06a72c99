"""The processes of a run: how they find each other, and how they agree to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.arguments import UsageError


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


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int) -> None:
    """Connects this process with the others: one per host.

    Args:
      coordinator: host:port of process 0; None where JAX finds it itself, as the other two.
      count: of processes.
      number: of this process.
      seconds: how long to wait for the others.

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
            later = seconds + _MARGIN
            jax.distributed.initialize(coordinator, count, number, initialization_timeout=later)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--multihost: {str(error).splitlines()[0]}") from None


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
