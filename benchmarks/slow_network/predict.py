"""What the planner says about a cell, from measurements that are not of this cell."""

from __future__ import annotations

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.slow_network import methods as compared
from benchmarks.slow_network import records as raw
from ef_optax.measure import planner


class Model:
    """The planner's model of the machine on which the records were made.

    The time of the computation comes from the steps without an exchange, the latency from
    collectives of a few bytes, the speed of the software from collectives of 4 MB on links without
    a limit, the codecs' times from codecs that run alone. No step with an exchange is looked at.
    :meth:`seconds` knows of a link its bandwidth alone; :meth:`probed_seconds` also knows how long
    collectives of 256 kB and 4 MB took over it. Of methods that are a step late it says nothing,
    since the share of a transfer that can be hidden is an argument of the planner.

    Args:
      records: of the benchmark.
      workers: which of them.
    """

    def __init__(self, records: list[dict[str, Any]], workers: int) -> None:
        self.workers = workers
        own = [record for record in records if record.get("workers") == workers]
        shapes = next(record["shapes"] for record in records if record["kind"] == "model")
        self.shapes = {k: jax.ShapeDtypeStruct(tuple(s), jnp.float32) for k, s in shapes.items()}
        codecs = {r["method"]: r["seconds_per_value"] for r in own if r["kind"] == "codec"}
        self.costs = {name: planner.CodecSeconds(*cost) for name, cost in codecs.items()}
        self.methods = {
            name: compared.sent(method)
            for name, method in compared.chosen().items()
            if (method.dense or name in codecs) and not compared.is_late(name)
        }
        self.compute, self._probes = {}, [r for r in own if r["kind"] == "probe"]
        for name in ("compute", compared.LOCAL, "DDP, compute"):
            times = [s for r in own if r.get("method") == name for s in r["seconds"]]
            if times:
                self.compute[name] = statistics.median(times)

    def alpha(self, rate: float | None) -> float:
        """Seconds of one message of a collective, from gathers of a few bytes."""
        few = [
            s
            for r in self._probes
            if r["method"] == "gather" and r["rate"] == rate and r["bytes"] < 1024
            for s in r["seconds"]
        ]
        return statistics.median(few) / max(1, self.workers - 1)

    def software(self) -> float:
        """Bits per second that an all-reduce of 4 MB receives where nothing limits the link.

        Infinite where that has not been measured.
        """
        many = [
            s
            for r in self._probes
            if r["method"] == "reduce" and r["rate"] is None and r["bytes"] == 1 << 22
            for s in r["seconds"]
        ]
        if not many:
            return math.inf
        received = planner.Round("reduce", 1 << 22).received_bytes(self.workers)
        return 8 * received / statistics.median(many)

    def link(self, rate: float | None) -> planner.Link:
        """The link between the workers."""
        software = self.software()
        bandwidth = rate or software
        return planner.Link(
            bandwidth, self.alpha(rate), efficiency=raw.FRAMES if rate else 1, software=software
        )

    def seconds(self, name: str, rate: float | None) -> float:
        """The planner's time of a step."""
        method = self.methods[name]
        dense = compared.chosen()["dense float32"]
        free = planner.CodecSeconds(0.0)
        costs = {m.name: self.costs.get(m.name, free) for m in (method, dense)}
        plan = planner.plan(
            self.shapes,
            self.workers,
            self.link(rate),
            self._computation(method),
            methods=[method] if method.dense else [dense, method],
            codec=costs,
            ring=True,
        )
        return plan.row(name).seconds

    def probed_seconds(self, name: str, rate: float | None) -> float:
        """The same with the times of collectives that were measured at this rate."""
        method = self.methods[name]
        leaves = planner.leaves_of(self.shapes)
        transfer = sum(
            self.collective(one.kind, one.message_bytes, rate)
            for one in planner.rounds_of(method, leaves, self.workers)
        )
        values = sum(leaf.size for leaf in leaves)
        codec = self.costs.get(name, planner.CodecSeconds(0.0)).of(values, self.workers)
        return self._computation(method) + (codec + transfer) / method.period

    def collective(self, kind: str, size: float, rate: float | None) -> float:
        """Seconds of a collective: measured ones joined by straight lines, the last one goes on."""
        times: dict[int, list[float]] = {}
        for record in self._probes:
            if (record["method"], record["rate"]) == (kind, rate):
                times.setdefault(record["bytes"], []).extend(record["seconds"])
        sizes = sorted(times)
        seconds = [statistics.median(times[one]) for one in sizes]
        if size <= sizes[-1]:
            return float(np.interp(size, sizes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (size - sizes[-1])

    def _computation(self, method: planner.Method) -> float:
        name = compared.LOCAL if method.period > 1 else "compute"
        return self.compute.get(name, self.compute["compute"])

    def limit(self, cell: raw.Cell) -> float | None:
        """Computation, bytes over the bare bandwidth, and latency; None if no record has a part.

        Of a method that is a step late it is the longer one of the computation and the rest.

        The bytes are those that the algorithm must receive; of PyTorch's those that it received.
        """
        alone = self.compute.get("DDP, compute" if cell.method.startswith("DDP") else "compute")
        if alone is None or not any(r["rate"] == cell.rate for r in self._probes):
            return None
        rate = cell.rate or self.software()
        method = self.methods.get(cell.method.removesuffix(compared.LATE))
        if method is None:
            return alone + 8 * cell.received / rate
        link = planner.Link(rate, self.alpha(cell.rate), efficiency=1.0)
        leaves = planner.leaves_of(self.shapes)
        rounds = planner.rounds_of(method, leaves, self.workers)
        transfer = planner.transfer_seconds(rounds, self.workers, link, ring=True)
        if compared.is_late(cell.method):
            return max(alone, transfer)
        return alone + transfer / method.period
