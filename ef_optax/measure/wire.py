"""What really crosses the wire: every collective of a compiled program, with its bytes.

The report reads the compiled HLO text and not the source, because XLA may widen, merge or split the
collectives of the source. It knows all spellings: asynchronous pairs, tuple shapes, and the three
forms of replica groups.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ef_optax._exchange.links import Kind, link_amount

_KINDS: dict[str, Kind] = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}
_OP = re.compile(
    r"=\s*(?P<shape>\([^=]*?\)|\S+)\s+(?P<op>"
    + "|".join(sorted(map(re.escape, _KINDS), key=len, reverse=True))
    + r")(?P<start>-start)?\((?P<operands>[^)]*)\)(?P<rest>.*)$"
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+[0-9]*[a-z0-9]*)\[(?P<dims>[0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY\s+)?%?(?P<name>[\w.\-]+)\s*\(.*->.*\{\s*$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = {"pred": 8, "token": 0, "opaque": 0}

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the compiled program, per device and execution.

    Attributes:
      kind: gather, reduce, reduce_scatter, all_to_all, permute or broadcast.
      group_size: number of devices that take part together.
      message_bytes: what one device contributes.
      link_bytes: what one device sends and receives under ring (gather, reduce, reduce_scatter) or
        pairwise algorithms (all_to_all, permute).
      conditional: whether it is in a branch, so that it may not be executed.
      times: executions in one run of the program; None if a loop's trip count is unknown.
      shapes: the shapes it moves, as HLO writes them.
      groups: the devices of each group, by their place in the program's order; of a permute, its
        pairs.
    """

    kind: str
    group_size: int
    message_bytes: int
    link_bytes: int
    conditional: bool
    times: int | None
    shapes: str
    groups: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class WireReport:
    """All collectives of a compiled program; see :func:`wire_report`."""

    collectives: tuple[Collective, ...]

    @property
    def rounds(self) -> int:
        """Number of collectives in the program text; each costs one latency."""
        return len(self.collectives)

    @property
    def message_bytes(self) -> int:
        """What one device contributes to all collectives, in bytes."""
        return sum(c.message_bytes * (c.times or 1) for c in self.collectives)

    @property
    def link_bytes(self) -> int:
        """What one device sends and receives in all collectives, in bytes."""
        return sum(c.link_bytes * (c.times or 1) for c in self.collectives)

    def of(self, *kinds: str) -> WireReport:
        """Only the collectives of these kinds."""
        return WireReport(tuple(c for c in self.collectives if c.kind in kinds))

    def over(self, group_size: int) -> WireReport:
        """Only the collectives among groups of this many devices."""
        return WireReport(tuple(c for c in self.collectives if c.group_size == group_size))

    def along(self, mesh: Any, axis_name: str | Sequence[str]) -> WireReport:
        """Only the collectives among the devices of an axis of the mesh.

        :meth:`over` cannot tell axes of equal size apart; this can.

        Args:
          mesh: the mesh of the program.
          axis_name: the axis; several of them are the axes over which devices take part together.

        Raises:
          ValueError: if the mesh has no such axis.
        """
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        if unknown := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(f"axis_name={unknown[0]!r} is no axis of the mesh {mesh.axis_names}.")
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        groups = _groups_along(sizes, [name for name in sizes if name in names])
        return WireReport(tuple(c for c in self.collectives if _is_along(c, groups)))

    def __str__(self) -> str:
        head = f"{'kind':<15}{'devices':>8}{'message B':>12}{'link B':>12}{'times':>7}  shapes"
        rows = [
            f"{c.kind:<15}{c.group_size:>8}{c.message_bytes:>12}{c.link_bytes:>12}"
            f"{'?' if c.times is None else c.times:>7}  {c.shapes}"
            + ("  (conditional)" if c.conditional else "")
            for c in self.collectives
        ]
        total = f"{'total':<15}{'':>8}{self.message_bytes:>12}{self.link_bytes:>12}"
        return "\n".join([head, *rows, total])


def wire_report(compiled: Any) -> WireReport:
    """Lists every collective of a compiled program with its bytes per device.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, or its HLO text.

    Returns:
      A :class:`WireReport`; printing it gives a table. *message* is what one worker contributes.
      *link* is what a device sends and receives: 2 (n-1) m for a gather of m bytes, 4 (n-1)/n m for
      a reduction.

    Raises:
      TypeError: if ``compiled`` is neither; a jitted function must be lowered and compiled first.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()
      >>> ef.wire_report(compiled).rounds
      0
    """
    if isinstance(compiled, str):
        text, devices = compiled, _device_count(compiled)
    elif hasattr(compiled, "as_text"):
        text = compiled.as_text()
        if "HloModule" not in text:
            raise TypeError(
                f"compiled={type(compiled).__name__} is lowered but not compiled; call .compile()."
            )
        devices = _device_count(text)
    else:
        raise TypeError(
            f"compiled={type(compiled).__name__} has no HLO text; pass "
            "jax.jit(f).lower(*args).compile()."
        )
    # HLO numbers the operands of long tuples in comments, "/*index=5*/".
    return WireReport(tuple(_collectives(re.sub(r"/\*.*?\*/", "", text), devices)))


def _device_count(text: str) -> int:
    header = text.split("\n", 1)[0]
    partitions = re.search(r"num_partitions=(\d+)", header)
    replicas = re.search(r"replica_count=(\d+)", header)
    count = int(partitions.group(1)) if partitions else 1
    return count * (int(replicas.group(1)) if replicas else 1)


def _collectives(text: str, devices: int) -> Iterator[Collective]:
    bodies, entry = _computations(text)
    conditional, times = _reach(bodies, entry)
    for name, lines in bodies.items():
        if name not in times:
            continue
        for line in lines:
            match = _OP.search(line)
            if match:
                yield _read(match, devices, conditional[name], times[name])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.split("\n"):
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            current = header.group("name")
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _reach(
    bodies: dict[str, list[str]], entry: str
) -> tuple[dict[str, bool], dict[str, int | None]]:
    """For each reachable computation, whether it is in a branch, and how often it runs."""
    conditional: dict[str, bool] = {entry: False}
    times: dict[str, int | None] = {entry: 1}
    queue = [entry]
    while queue:
        name = queue.pop()
        for line in bodies.get(name, []):
            called = re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=", line)
            if not called:
                if "true_computation=" not in line:
                    continue
            branch = " conditional(" in line
            loop = " while(" in line
            trips = _TRIPS.search(line)
            for target in _called(line):
                if target in times or target not in bodies:
                    continue
                outer = times[name]
                count = (int(trips.group(1)) if trips else None) if loop else 1
                times[target] = None if outer is None or count is None else outer * count
                conditional[target] = conditional[name] or branch
                queue.append(target)
    return conditional, times


def _called(line: str) -> list[str]:
    names: list[str] = []
    keys = "calls|to_apply|body|condition|true_computation|false_computation"
    names += re.findall(rf"(?:{keys})=%?([\w.\-]+)", line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += [x.strip().lstrip("%") for x in group.split(",")]
    return names


def _read(match: re.Match[str], devices: int, conditional: bool, times: int | None) -> Collective:
    op = match.group("op")
    kind = _KINDS[op]
    shapes = [_bytes(s) for s in _SHAPE.finditer(match.group("shape"))]
    groups = _groups(match.group("rest"), devices)
    size = devices if kind == "permute" else len(groups[0])
    if match.group("start") and len(shapes) > 1:  # (operands, results, ...): keep the results
        shapes = shapes[len(shapes) // 2 :] if op != "collective-permute" else shapes[:1]
    result = sum(shapes)
    message = {"gather": result // size, "reduce_scatter": result * size}.get(kind, result)
    link = link_amount(kind, size, message)
    shape = match.group("shape")
    return Collective(kind, size, message, link, conditional, times, shape, groups)


def _bytes(match: re.Match[str]) -> int:
    dims = [int(d) for d in match.group("dims").split(",") if d]
    dtype = match.group("dtype")
    found = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(found.group()) if found else 0)
    return math.ceil(math.prod(dims) * bits / 8)


def _is_along(collective: Collective, groups: Groups) -> bool:
    if collective.kind == "permute":
        home = {device: i for i, group in enumerate(groups) for device in group}
        return all(home[sender] == home[receiver] for sender, receiver in collective.groups)
    return set(map(frozenset, collective.groups)) == set(map(frozenset, groups))


def _groups(rest: str, devices: int) -> Groups:
    """The groups of ``{{0,2},{1,3}}``, ``[2,2]<=[4]``, ``mesh[...] {axes}``, or pairs."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest)
    if listed:
        found = re.findall(r"\{([\d, ]+)\}", listed.group(1))
        return tuple(tuple(map(int, group.split(","))) for group in found)
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", rest)
    if tiled:
        rows, columns = int(tiled.group(1)), int(tiled.group(2))
        sizes = [int(size) for size in (tiled.group(3) or str(rows * columns)).split(",")]
        order = [int(axis) for axis in tiled.group(4).split(",")] if tiled.group(4) else None
        ids = np.arange(rows * columns).reshape(sizes).transpose(order).reshape(rows, columns)
        return tuple(map(tuple, ids.tolist()))
    named = re.search(r"replica_groups=@?mesh\S*?\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if named:
        pairs = re.findall(r"'?([\w]+)'?\s*=\s*(\d+)", named.group(1))
        sizes = {name: int(size) for name, size in pairs}
        return _groups_along(sizes, re.findall(r"'([\w]+)'", named.group(2)) or list(sizes))
    return (tuple(range(devices)),)


def _groups_along(sizes: Mapping[str, int], axes: Sequence[str]) -> Groups:
    """Devices, numbered row by row, that differ in nothing but their place along these axes."""
    names = list(sizes)
    others = [name for name in names if name not in axes]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    ids = ids.transpose([names.index(name) for name in (*others, *axes)])
    rows = ids.reshape(-1, math.prod(sizes[name] for name in axes))
    return tuple(map(tuple, rows.tolist()))
