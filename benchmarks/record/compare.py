"""What differs between two records: what must be equal, and how times have changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Differences = Iterator[tuple[bool, str]]
"""Lines, and whether each is of something that must be equal."""

NOTED = 0.1
"""Times are printed where they have changed by more than this."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> Differences:
    """All that differs in the parts that both records have."""
    parts = {
        "trajectories": trajectories,
        "wire": wire,
        "compile": lambda old, new: times("compile", old["cells"], new["cells"]),
        "codec": lambda old, new: times("codec", old["rows"], new["rows"]),
        "tests": lambda old, new: tests("tests", old, new),
        "slow": lambda old, new: tests("slow", old, new),
    }
    for name, compare in parts.items():
        if name in old and name in new:
            yield from compare(old[name], new[name])
        elif name in old or name in new:
            yield False, f"{name}: only in the {'old' if name in old else 'new'} record"


def trajectories(old: dict[str, Any], new: dict[str, Any]) -> Differences:
    """Checksums by rule and mode; where they differ, how far apart the parameters end."""
    yield from refusals(old["refused"], new["refused"])
    for rule in names(old["rules"], new["rules"]):
        before, after = old["rules"].get(rule, {}), new["rules"].get(rule, {})
        if not before:
            yield False, f"trajectories, {rule}: only in the new record"
        for mode in before:
            change = apart(before[mode], after.get(mode))
            if change:
                yield True, f"trajectories, {rule}, {mode}: {change}"
    yield from times("trajectories", old["seconds"], new["seconds"])


def apart(old: dict[str, Any], new: dict[str, Any] | None) -> str:
    """How two results differ; empty if they do not."""
    if new is None:
        return "missing in the new record"
    if "error" in old or "error" in new:
        before, after = old.get("error", "no error"), new.get("error", "no error")
        return "" if before == after else f"{before} before, {after} now"
    if old["sha256"] == new["sha256"]:
        return ""
    a, b = final(old), final(new)
    if a.shape != b.shape:
        return f"{a.size} parameters before, {b.size} now"
    largest = float(np.max(np.abs(a - b), initial=0.0))
    relative = largest / max(float(np.max(np.abs(a), initial=0.0)), 1e-30)
    return f"other bits; parameters at the end {largest:.2g} apart ({relative:.2g} of the largest)"


def final(result: dict[str, Any]) -> np.ndarray:
    """The parameters at the end, as numbers that can be subtracted."""
    from benchmarks.record.trajectories import values

    return values(result).astype(np.float64)


def refusals(old: dict[str, str], new: dict[str, str]) -> Differences:
    """Compressors that a rule refuses in one record only, or otherwise."""
    for name in names(old, new):
        if old.get(name) != new.get(name):
            before, after = old.get(name, "accepted or absent"), new.get(name, "accepted or absent")
            yield True, f"trajectories, {name}: {before} before, {after} now"


def wire(old: dict[str, Any], new: dict[str, Any]) -> Differences:
    """Bits, constants, traffic and collectives by codec."""
    for codec in names(old["codecs"], new["codecs"]):
        before, after = old["codecs"].get(codec), new["codecs"].get(codec)
        if before is None or after is None:
            which = "old" if after is None else "new"
            yield after is None, f"wire, {codec}: only in the {which} record"
            continue
        for what in names(before, after):
            for label, a, b in unequal(what, before.get(what), after.get(what)):
                yield True, f"wire, {codec}, {label}: {a} before, {b} now"
    yield from times("wire", {"": old["seconds"]}, {"": new["seconds"]})


def unequal(what: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The answers that differ, shape by shape where there is one for each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in names(old, new):
            yield from unequal(f"{what} of {key}", old.get(key), new.get(key))
    elif old != new:
        yield what, old, new


def times(part: str, old: dict[str, Any], new: dict[str, Any], least: float = 0.0) -> Differences:
    """Ratios of numbers that have changed noticeably and are not small; none must be equal."""
    for name in names(old, new):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            which = "old" if after is None else "new"
            yield False, f"{part}, {name}: only in the {which} record"
            continue
        for key in names(before, after):
            a, b = before.get(key), after.get(key)
            if a and b and max(a, b) >= least and not 1 - NOTED <= b / a <= 1 + NOTED:
                label = ", ".join(filter(None, (part, name, key.replace("_", " "))))
                yield False, f"{label}: {a:.3g} -> {b:.3g} (x {b / a:.2f})"


def tests(part: str, old: dict[str, Any], new: dict[str, Any]) -> Differences:
    """Counts and seconds of a stage; a stage that failed must not."""
    if new["exit_code"]:
        yield True, f"{part}: pytest ended with {new['exit_code']}"
    if old["counts"] != new["counts"]:
        yield False, f"{part}: {old['counts']} before, {new['counts']} now"
    keys = ("wall_seconds", "cpu_seconds", "collect_cpu_seconds")
    yield from times(part, {"": {k: old[k] for k in keys}}, {"": {k: new[k] for k in keys}})
    seconds = [
        {name: {"cpu_seconds": row["cpu_seconds"]} for name, row in one["files"].items()}
        for one in (old, new)
    ]
    yield from times(part, *seconds, least=5.0)


def names(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys of both, those of the old record first."""
    return [*old, *(name for name in new if name not in old)]
