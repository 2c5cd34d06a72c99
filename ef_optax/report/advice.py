"""What the statistics of a run suggest, each with its reason."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from ef_optax.report.runs import Method

Timeline = Sequence[tuple[float, Mapping[str, float]]]

GROWTH = 1.1
"""A residual grows if, relative to the gradient, its mean over the last quarter of the run is this
multiple of its mean over the quarter before."""

SMALL, LARGE = 0.1, 10.0
"""Of the residual, relative to the gradient of a step."""

BELOW_PROMISE = 0.95
"""A measured contraction below this multiple of the promise breaks it; above, it may be chance."""

LOST = 0.01
"""The share of what is compressed that a safeguard may drop at a step."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """A suggestion; ``where`` is a leaf, or the exchange as a whole."""

    kind: Literal["warning", "hint"]
    method: str
    where: str
    reason: str
    remedy: str


def advise(methods: Sequence[Method]) -> list[Advice]:
    """All advice on the methods that were monitored, warnings first."""
    found = [one for m in methods for one in _on_method(m.name, m.monitored())]
    return sorted(found, key=lambda one: one.kind != "warning")


def exchanges_of(timeline: Timeline) -> list[str]:
    """What the names of each exchange begin with: ``""``, or ``"uplink/"`` and so on."""
    last = timeline[-1][1]
    return [n.removesuffix("steps") for n in last if f"/{n}".endswith("/steps")]


def leaves_of(timeline: Timeline, exchange: str) -> list[str]:
    """The leaves (or groups) of an exchange, by their names."""
    start = f"{exchange}relative_error/"
    return [name.removeprefix(start) for name in timeline[-1][1] if name.startswith(start)]


def series(timeline: Timeline, name: str) -> list[float]:
    """One statistic over time, where it is defined."""
    return [row[name] for _, row in timeline if name in row]


def lately(values: Sequence[float]) -> float | None:
    """The mean over the last quarter, because a single step may be an exception."""
    return statistics.fmean(values[-max(1, len(values) // 4) :]) if values else None


def grows(values: Sequence[float]) -> bool:
    """Whether the last quarter is higher than the one before."""
    quarter = len(values) // 4
    if not quarter:
        return False
    now, before = values[-quarter:], values[-2 * quarter : -quarter]
    return statistics.fmean(now) > GROWTH * statistics.fmean(before)


def _on_method(method: str, timeline: Timeline) -> list[Advice]:
    if not timeline:
        return []
    found: list[Advice] = []
    for exchange in exchanges_of(timeline):
        found += _on_exchange(method, timeline, exchange)
        for leaf in leaves_of(timeline, exchange):
            found += _on_leaf(method, timeline, exchange, leaf)
    return found


def _on_exchange(method: str, timeline: Timeline, exchange: str) -> list[Advice]:
    last = timeline[-1][1]
    whole = exchange.removesuffix("/") or "all leaves"
    found = []
    skipped, steps = last.get(f"{exchange}skipped_steps", 0), last.get(f"{exchange}steps", 0)
    if skipped:
        found.append(
            Advice(
                "warning",
                method,
                whole,
                f"{skipped:.0f} steps were skipped and {steps:.0f} were made, because some "
                "worker's gradient was not finite or too large",
                "lower the learning rate or the loss scale, or clip the gradient before the rule",
            )
        )
    ratios = [
        series(timeline, f"{exchange}residual_to_gradient/{leaf}")
        for leaf in leaves_of(timeline, exchange)
    ]
    sent = last.get(f"{exchange}relative_error", 0) > 0
    if sent and ratios and all(r and r[-1] < SMALL for r in ratios):
        found.append(
            Advice(
                "hint",
                method,
                whole,
                f"the residual is below {SMALL:g} of the gradient everywhere (at most "
                f"{max(r[-1] for r in ratios):.2g})",
                "compress more: a smaller ratio, fewer bits or a lower rank",
            )
        )
    share = last.get(f"{exchange}dropped_share", 0)
    if share > LOST:
        found.append(
            Advice(
                "warning",
                method,
                whole,
                f"safeguards drop {share:.1%} of what is compressed at a step",
                "raise the threshold of the clip, or compress less so that it is not needed",
            )
        )
    return found


def _on_leaf(method: str, timeline: Timeline, exchange: str, leaf: str) -> list[Advice]:
    def now(name: str) -> float | None:
        return lately(series(timeline, f"{exchange}{name}/{leaf}"))

    found = []
    where = f"{exchange}{leaf}"
    measured, promised = now("alpha_hat"), now("alpha_promised")
    ratio = now("residual_to_gradient")
    growing = grows(series(timeline, f"{exchange}residual_to_gradient/{leaf}"))
    large = ratio is not None and ratio > LARGE
    contraction = "" if measured is None else f"alpha-hat {measured:.2g}"
    if promised is not None:
        contraction += f", promised {promised:.2g}"
    if measured is not None and promised is not None and measured < BELOW_PROMISE * promised:
        state = "still growing" if growing else "not growing"
        found.append(
            Advice(
                "warning",
                method,
                where,
                f"{contraction}, residual {state}",
                "raise the ratio or send it dense (ef.per_leaf)",
            )
        )
    elif growing and large:
        found.append(
            Advice(
                "warning",
                method,
                where,
                f"the residual is {ratio:.3g} times the gradient and still growing ({contraction})",
                "raise the ratio or the bits, or send it dense (ef.per_leaf)",
            )
        )
    elif large:
        found.append(
            Advice(
                "hint",
                method,
                where,
                f"the residual is {ratio:.3g} times the gradient, and steady ({contraction}): what "
                "is sent is that many steps old",
                "raise the ratio if the accuracy is below that of the uncompressed run",
            )
        )
    bits = now("bits_ratio")
    if bits is not None and bits < 1 and (now("relative_error") or 0) > 0:
        found.append(
            Advice(
                "hint",
                method,
                where,
                f"its message has {1 / bits:.2g} times the bits of the values themselves",
                "send it dense (ef.per_leaf), which takes fewer bits and has no error",
            )
        )
    return found
