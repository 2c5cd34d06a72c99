"""Workers in network namespaces, joined by a bridge, with links that ``tc`` makes slow.

Each worker has a namespace with one interface, ``eth0``, whose other end is a port of the bridge.
A token bucket at both ends gives the link the same rate in each direction. In its namespace a
worker's host name stands for its own address, which Gloo announces to the others. This needs root
and iproute2; without them the workers meet on the loopback interface, and nothing can be slowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

SUBNET = "10.77.0"
QUEUE = "200ms"
"""How long a packet may wait at the token bucket before it is dropped."""

_ETC = pathlib.Path("/etc/netns")
_NAME = re.compile(r"\befo(\d+)-(?:\d+|bridge)\b")


def run(*command: str, check: bool = True) -> str:
    """What a command prints.

    Raises:
      RuntimeError: it fails; the message has its own words.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(absent)} of iproute2 cannot be found" if absent else ""


def burst(rate: float) -> int:
    """Bytes that pass at once after a pause: 0.25 ms of the rate, and at least ten packets."""
    return max(15_140, int(rate / 8 * 0.25e-3))


@dataclasses.dataclass(frozen=True)
class Network:
    """The workers' network.

    Attributes:
      addresses: of each worker.
      owner: the process whose names the namespaces carry; None on the loopback interface.
    """

    addresses: tuple[str, ...]
    owner: int | None = None

    def inside(self, worker: int, command: list[str]) -> list[str]:
        """The command that runs ``command`` where this worker lives."""
        if self.owner is None:
            return command
        return ["ip", "netns", "exec", f"efo{self.owner}-{worker}", *command]

    def limit(self, rate: float | None) -> None:
        """Gives every link this many bits per second in each direction; None takes the limit away.

        Raises:
          RuntimeError: ``tc`` refuses, or the workers are on the loopback interface.
        """
        if self.owner is None:
            if rate is None:
                return
            raise RuntimeError("the loopback interface is not slowed down; this needs namespaces")
        for worker in range(len(self.addresses)):
            name = f"efo{self.owner}-{worker}"
            for where in (["-n", name, "qdisc"], ["qdisc"]):
                device = "eth0" if len(where) > 1 else name
                run("tc", *where, "del", "dev", device, "root", check=False)
                if rate is not None:
                    bucket = ["rate", f"{rate:.0f}bit", "burst", str(burst(rate))]
                    add = ["add", "dev", device, "root", "tbf", *bucket, "latency", QUEUE]
                    run("tc", *where, *add)


@contextlib.contextmanager
def network(workers: int, isolated: bool = True) -> Iterator[Network]:
    """A network of this many workers, which is gone at the end however it comes.

    SIGTERM ends the block like Ctrl-C. What a killed run left behind is removed first.

    Args:
      workers: how many.
      isolated: whether each worker has a namespace; otherwise they meet on the loopback interface.

    Raises:
      RuntimeError: a namespace cannot be made; the message has the words of ``ip``.
    """
    if not isolated:
        yield Network(("127.0.0.1",) * workers)
        return
    for owner in owners():
        if not pathlib.Path(f"/proc/{owner}").exists():
            remove(owner)
    owner = os.getpid()
    ends = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in ends]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        remove(owner)
        yield _build(owner, workers)
    finally:
        for number in ends:  # a second signal must not leave half of it behind
            signal.signal(number, signal.SIG_IGN)
        remove(owner)
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _build(owner: int, workers: int) -> Network:
    bridge = f"efo{owner}-bridge"
    run("ip", "link", "add", bridge, "type", "bridge")
    run("ip", "link", "set", bridge, "up")
    addresses = []
    for worker in range(workers):
        name, address = f"efo{owner}-{worker}", f"{SUBNET}.{worker + 1}"
        folder = _ETC / name  # `ip netns exec` shows its files as those of /etc
        folder.mkdir(parents=True, exist_ok=True)
        hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
        (folder / "hosts").write_text(hosts, encoding="utf-8")
        run("ip", "netns", "add", name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", name, "master", bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")
        addresses.append(address)
    return Network(tuple(addresses), owner)


def owners() -> set[int]:
    """The processes to which namespaces, interfaces and files of this kind belong."""
    listed = run("ip", "netns", check=False) + run("ip", "link", check=False)
    listed += "\n".join(path.name for path in _ETC.glob("efo*"))
    return {int(owner) for owner in _NAME.findall(listed)}


def remove(owner: int) -> None:
    """Removes all that belongs to a process."""
    for text in run("ip", "netns", check=False).splitlines():
        if text.startswith(f"efo{owner}-"):
            run("ip", "netns", "del", text.split()[0], check=False)
    for name in {m[0] for m in re.finditer(_NAME, run("ip", "link", check=False))}:
        if name.startswith(f"efo{owner}-"):
            run("ip", "link", "del", name, check=False)
    for path in _ETC.glob(f"efo{owner}-*"):
        shutil.rmtree(path, ignore_errors=True)
