"""A plan: the time of a step of every method, and whether it pays to compress."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ef_optax.measure.planner.cost import Round, Tier, inside_seconds, transfer_seconds
from ef_optax.measure.planner.links import Link, seconds
from ef_optax.measure.planner.methods import Method, rounds_of, state_bytes
from ef_optax.measure.planner.methods import methods as all_methods
from ef_optax.measure.planner.shapes import Leaf, leaves_of
from ef_optax.measure.planner.timing import CodecSeconds, codec_seconds

WORTH = 1.05
"""A method must be this much faster than the best dense one before it is recommended."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method in a plan; all times are per step, also those of methods with local steps.

    Attributes:
      method: the method.
      rounds: the rounds of one exchange over the slow link.
      message_bytes: what one worker contributes to one exchange.
      received_bytes: what one device receives over the slow link in a step, on average.
      codec: seconds of the codec.
      transfer: seconds of the slow link.
      inside: seconds of the fast link, inside of each worker.
      seconds: seconds of a step, with what is hidden behind computation taken off.
      state_bytes: bytes of the method's state on each device.
      break_even: the bandwidth in bits per second below which the method is faster than the best
        dense one; ``inf`` if it always is, 0 if it never is.
    """

    method: Method
    rounds: tuple[Round, ...]
    message_bytes: float
    received_bytes: float
    codec: float
    transfer: float
    inside: float
    seconds: float
    state_bytes: int
    break_even: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The methods beside each other; printing it gives a table and a recommendation.

    Attributes:
      rows: one row a method, in the order in which they were given.
      parameters: number of parameters.
      workers: n.
      link: the link between the workers.
      compute: seconds of the computation of a step.
      steps: steps of an epoch, or None.
    """

    rows: tuple[Row, ...]
    parameters: int
    workers: int
    link: Link
    compute: float
    steps: int | None = None

    def row(self, name: str) -> Row:
        """The row of the method of this name.

        Raises:
          KeyError: if there is none; the message has the names.
        """
        for row in self.rows:
            if row.method.name == name:
                return row
        raise KeyError(f"{name!r} is not in the plan; it has {[r.method.name for r in self.rows]}.")

    @property
    def dense(self) -> Row:
        """The fastest of the methods that do not compress."""
        return min((r for r in self.rows if r.method.dense), key=lambda r: r.seconds)

    @property
    def best(self) -> Row:
        """The fastest method of all."""
        return min(self.rows, key=lambda r: r.seconds)

    @property
    def best_every_step(self) -> Row:
        """The fastest of the methods that exchange in every step."""
        return min((r for r in self.rows if r.method.period == 1), key=lambda r: r.seconds)

    def utilisation(self, row: Row) -> float:
        """The share of a step in which the device computes the model."""
        return self.compute / row.seconds if row.seconds else 1.0

    @property
    def recommendation(self) -> str:
        """What to do, in one or two sentences."""
        dense, each, best = self.dense, self.best_every_step, self.best
        base = f"{dense.method.name} takes {_time(dense.seconds)} a step"
        gain = dense.seconds / each.seconds
        if gain < WORTH and dense.seconds / best.seconds < WORTH:
            return f"Do not compress here: {base}, and nothing is more than 5% faster."
        words = []
        if gain < WORTH:
            words.append(f"Compressing every step does not pay here: {base}.")
        else:
            fewer = 4 * self.parameters / max(1, each.message_bytes)
            words.append(
                f"The fastest step is that of {each.method.name}: {_time(each.seconds)}, "
                f"{gain:.3g} times as fast as {dense.method.name}. Its message is {fewer:.3g} "
                "times smaller than float32; check the loss that it reaches against a milder one's."
            )
        if each.seconds / best.seconds >= WORTH:
            words.append(
                f"{best.method.name} takes {_time(best.seconds)}, but its steps are local ones: "
                "compare the loss that it reaches."
            )
        return " ".join(words)

    def __str__(self) -> str:
        head = f"{self.parameters:,} parameters, {self.workers} workers, {_rate(self.link)}"
        head += f", {_time(self.compute)} of computation a step"
        epoch = self.steps is not None
        titles = ["method", "message", "received", "transfer", "codec", "step", "busy", "x dense"]
        titles += [*(["epoch"] if epoch else []), "break-even", "state"]
        table = [titles]
        for row in self.rows:
            cells = [
                row.method.name,
                _size(row.message_bytes),
                _size(row.received_bytes),
                _time(row.transfer),
                _time(row.codec),
                _time(row.seconds),
                f"{100 * self.utilisation(row):.3g}%",
                f"{self.dense.seconds / row.seconds:.3g}",
                *([_time(row.seconds * (self.steps or 0))] if epoch else []),
                _break_even(row),
                _size(row.state_bytes),
            ]
            table.append(cells)
        widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in table
        ]
        return "\n".join([head, "", *lines, "", self.recommendation])


def plan(
    params: Any,
    workers: int,
    link: Link,
    step_time: float | str,
    *,
    methods: Sequence[Method] | None = None,
    inside: Link | Sequence[Tier] | None = None,
    devices: int = 1,
    overlap: float = 0.0,
    codec: str | float | Mapping[str, CodecSeconds] = "measured",
    ring: bool = False,
    steps: int | None = None,
) -> Plan:
    """The time of a training step with each method, from exact bytes and the alpha-beta model.

    A step is ``computation + codec + inside + what of the transfer is not hidden``. With several
    ``devices`` in a worker (HSDP), each holds an equal part of the model and exchanges only that
    part with the other workers, in the same time; before that, gradients are reduced and after it
    weights are gathered over the fast link, in float32.

    It knows nothing of the loss: a method that is faster a step may need more steps.

    Args:
      params: a tree of parameters or of their shapes, or their number (see :func:`leaves_of`).
      workers: n, the workers that exchange over ``link``.
      link: the link of each device to the other workers.
      step_time: seconds of the computation of a step alone, or text such as ``"0.4s"``.
      methods: what to compare, by default all of :func:`methods`; at least one must be dense.
      inside: the fast link between the devices of a worker; or several :class:`Tier`, from the
        fastest outwards, such as 8 devices of a host and 4 hosts of a pod.
      devices: how many devices a worker has, if ``inside`` is one link.
      overlap: the share of the computation behind which a transfer can be hidden, in [0, 1]; 0 is
        what a step does whose exchange begins when all gradients are there.
      codec: ``"measured"`` on this machine, ``"free"``, the same number of seconds per value for
        all methods, or :class:`CodecSeconds` by the name of the method.
      ring: whether latencies are those of rings, with n - 1 steps, and not of log2 n steps.
      steps: steps of an epoch.

    Returns:
      The :class:`Plan`.

    Raises:
      ValueError: for an argument out of range; the message has its name and the remedy.

    Example:
      >>> fast = plan(1e6, 4, Link("400gbit", "5us"), "0.2s", codec="free")
      >>> fast.recommendation.split(":")[0]
      'Do not compress here'
    """
    methods = all_methods() if methods is None else methods
    _check(workers=workers, devices=devices, overlap=overlap, steps=steps, methods=methods)
    compute, leaves = seconds(step_time, "step_time"), leaves_of(params)
    tiers = _tiers(inside, devices)
    devices = math.prod(tier.devices for tier in tiers)
    total = sum(leaf.size for leaf in leaves)
    own = tuple(_part(leaf, devices) for leaf in leaves)
    costs = _costs(codec, methods)
    fast = inside_seconds(4 * total, tiers, ring=ring)

    def step_seconds(method: Method, rounds: Sequence[Round], link: Link) -> float:
        transfer = transfer_seconds(rounds, workers, link, ring=ring) / method.period
        work = costs[method.name].of(total // devices, workers) / method.period
        return compute + work + fast + max(0.0, transfer - overlap * compute)

    rounds = {m.name: rounds_of(m, own, workers) for m in methods}
    dense = [m for m in methods if m.dense]
    rows = []
    for method in methods:
        mine = rounds[method.name]

        def advantage(rate: float, method: Method = method, mine: Any = mine) -> float:
            at = link.at(rate)
            return min(step_seconds(m, rounds[m.name], at) for m in dense) - step_seconds(
                method, mine, at
            )

        rows.append(
            Row(
                method=method,
                rounds=mine,
                message_bytes=sum(one.message_bytes for one in mine),
                received_bytes=sum(r.received_bytes(workers) for r in mine) / method.period,
                codec=costs[method.name].of(total // devices, workers) / method.period,
                transfer=transfer_seconds(mine, workers, link, ring=ring) / method.period,
                inside=fast,
                seconds=step_seconds(method, mine, link),
                state_bytes=state_bytes(method, own, workers),
                break_even=0.0 if method.dense else _crossing(advantage),
            )
        )
    return Plan(tuple(rows), total, workers, link, compute, steps)


def _check(
    *, workers: int, devices: int, overlap: float, steps: int | None, methods: Sequence[Method]
) -> None:
    for name, value in (("workers", workers), ("devices", devices), ("steps", steps)):
        if name == "steps" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap={overlap!r} must be a share in [0, 1].")
    if not any(method.dense for method in methods):
        raise ValueError(
            "methods has no dense method to compare with; add planner.methods()[0] (float32) or "
            "planner.methods()[1] (bfloat16)."
        )


def _tiers(inside: Link | Sequence[Tier] | None, devices: int) -> tuple[Tier, ...]:
    """The tiers inside of a worker; none if it is one device."""
    if inside is None:
        if devices > 1:
            raise ValueError(f"devices={devices} need the link between them; give inside=Link(..).")
        return ()
    if isinstance(inside, Link):
        return (Tier(devices, inside),)
    if devices > 1:
        raise ValueError(f"devices={devices} with several tiers, which have their own numbers.")
    return tuple(inside)


def _part(leaf: Leaf, devices: int) -> Leaf:
    """A device's part of a leaf, which is split along its first axis and padded."""
    if devices == 1 or not leaf.shape:
        return leaf
    return dataclasses.replace(leaf, shape=(-(-leaf.shape[0] // devices), *leaf.shape[1:]))


def _costs(codec: Any, methods: Sequence[Method]) -> Mapping[str, CodecSeconds]:
    if codec == "measured":
        return {m.name: codec_seconds(m) for m in methods}
    if isinstance(codec, Mapping):
        if missing := [m.name for m in methods if m.name not in codec]:
            raise ValueError(f"codec has no entry for {missing}; give CodecSeconds(own, other).")
        return codec
    if codec != "free" and (isinstance(codec, str | bool) or not 0 <= codec < math.inf):
        raise ValueError(
            f"codec={codec!r} must be 'measured', 'free', or seconds per value such as 1e-10."
        )
    each = 0.0 if codec == "free" else float(codec)
    return {m.name: CodecSeconds(0.0 if m.dense else each) for m in methods}


def _crossing(advantage: Callable[[float], float]) -> float:
    """The bandwidth at which an advantage ends, which grows as the link gets slower."""
    slow, fast = 1.0, 1e18
    if advantage(slow) <= 0:
        return 0.0
    if advantage(fast) > 0:
        return math.inf
    while fast / slow > 1.001:
        middle = math.sqrt(slow * fast)
        slow, fast = (middle, fast) if advantage(middle) > 0 else (slow, middle)
    return slow


# ---------------------------------------------------------------------------- as text


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} {units[-1][1]}"


def _size(value: float) -> str:
    return _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])


def _time(value: float) -> str:
    if value == 0:
        return "0 s"
    if value < 1:
        return _scaled(value * 1e6, [(1e3, "ms"), (1, "us")])
    return _scaled(value, [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")])


def _bits(value: float) -> str:
    units = [(1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1, "bit/s")]
    return _scaled(value, units)


def _rate(link: Link) -> str:
    shared = f" shared by {link.sharing} devices" if link.sharing > 1 else ""
    rate = link.bytes_per_second * 8 * link.sharing / link.efficiency
    return f"{_bits(rate)}{shared}, latency {_time(link.alpha)}"


def _break_even(row: Row) -> str:
    if row.method.dense:
        return ""
    if row.break_even == 0:
        return "never"
    return "always" if math.isinf(row.break_even) else _bits(row.break_even)
