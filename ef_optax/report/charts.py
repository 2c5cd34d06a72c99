"""The charts of a report, as Vega-Lite specifications made by Altair."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ef_optax.report.advice import Timeline, exchanges_of, leaves_of
from ef_optax.report.runs import Method, ReportError

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's, which stay distinct for every common kind of colour blindness."""

DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2])
"""So that more methods than colours, and a print in black and white, can be told apart."""

WIDTH, HEIGHT = 280, 220

BY_LEAF = {
    "residual_to_gradient": "residual / gradient",
    "alpha_hat": "measured contraction alpha-hat",
    "alpha_share": "alpha-hat / promised alpha",
    "relative_error": "relative error of the message",
    "bits_ratio": "32 bits / bits sent",
    "values_ratio": "values / values sent",
}
"""The statistics that are drawn by leaf over time, and their titles."""

Spec = dict[str, Any]


def altair() -> Any:
    """The charting library, which only a report needs."""
    try:
        import altair as alt
    except ImportError:
        raise ReportError("the report needs altair: pip install 'ef-optax[report]'") from None
    return alt


def curves(methods: Sequence[Method], bandwidth: float | None) -> Spec | None:
    """Accuracy and losses of all methods against time, bytes and (with a bandwidth) seconds."""
    alt = altair()
    quantities = [
        (name, title)
        for name, title in (
            ("test_accuracy", "test accuracy"),
            ("train_loss", "training loss"),
            ("test_loss", "test loss"),
        )
        if any(m.curve(name) for m in methods)
    ]
    rows = []
    for name, title in quantities:
        panels = []
        for axis, x in _axes(methods, bandwidth):
            points = [p for m in methods for p in _points(m, name, x)]
            if points:
                panels.append(_panel(alt, points, axis, title, [m.name for m in methods]))
        if panels:
            rows.append(alt.hconcat(*panels))
    return _spec(alt.vconcat(*rows)) if rows else None


def _axes(
    methods: Sequence[Method], bandwidth: float | None
) -> list[tuple[str, Callable[[Method], float | None]]]:
    """The title of each horizontal axis, and how many of its units one unit of time takes."""

    def megabytes(method: Method) -> float | None:
        sent = method.message_bytes
        return None if sent is None else sent * method.steps_per_unit / 1e6

    def seconds(method: Method) -> float | None:
        sent = method.link_bytes
        if sent is None or bandwidth is None:
            return None
        return 8 * sent * method.steps_per_unit / bandwidth

    axes: list[tuple[str, Callable[[Method], float | None]]] = [
        ("steps", lambda m: m.steps_per_unit),
        ("megabytes in messages of a worker", megabytes),
    ]
    if bandwidth is not None:
        axes.append((f"seconds on the links at {bandwidth:g} bit/s", seconds))
    return axes


def _points(method: Method, name: str, x: Callable[[Method], float | None]) -> list[Spec]:
    each = x(method)
    if each is None:
        return []
    return [
        {
            "method": method.name,
            "x": time * each,
            "mean": statistics.fmean(values),
            "low": min(values),
            "high": max(values),
        }
        for time, values in method.curve(name)
    ]


def _panel(alt: Any, points: list[Spec], x: str, y: str, names: list[str]) -> Any:
    chart = alt.Chart(alt.Data(values=points)).properties(width=WIDTH, height=HEIGHT)
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=3,
        labelLimit=400,
        symbolType="stroke",
        symbolOpacity=1,
        symbolSize=400,
        symbolStrokeWidth=2,
    )
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    colour = alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), legend=legend)
    dash = alt.StrokeDash("method:N", scale=alt.Scale(domain=names, range=dashes), legend=legend)
    across = alt.X("x:Q", title=x, scale=alt.Scale(type="log" if "steps" not in x else "linear"))
    scale = alt.Scale(zero=False, type="linear" if "accuracy" in y else "log")
    band = chart.mark_area(opacity=0.15).encode(
        x=across, y=alt.Y("low:Q", title=y, scale=scale), y2="high:Q", color=colour
    )
    line = chart.mark_line(strokeWidth=2).encode(
        x=across,
        y=alt.Y("mean:Q", title=y, scale=scale),
        color=colour,
        strokeDash=dash,
        tooltip=["method:N", alt.Tooltip("x:Q", title=x), "mean:Q", "low:Q", "high:Q"],
    )
    return band + line


def by_leaf(method: Method) -> Spec | None:
    """Every statistic of ``BY_LEAF`` as leaves over time, in a colour scale; chosen by a menu."""
    alt, timeline = altair(), method.monitored()
    points = _cells(timeline) if timeline else []
    if not any(row.get("relative_error") != 0 for _, row in timeline) or not points:
        return None  # nothing was monitored, or everything was sent
    present = [title for title in BY_LEAF.values() if any(p["what"] == title for p in points)]
    menu = alt.binding_select(options=present, name="statistic: ")
    chosen = alt.param(name="statistic", bind=menu, value=present[0])
    # Not a list of names: Vega would put them into an expression, in which some signs may not be.
    in_order = alt.EncodingSortField("order", op="min")
    chart = (
        alt.Chart(alt.Data(values=points))
        .transform_filter("datum.what === statistic")
        .mark_rect()
        .encode(
            x=alt.X("time:O", title=method.unit, axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("leaf:N", title=None, sort=in_order, axis=alt.Axis(labelLimit=260)),
            color=alt.Color(
                "value:Q",
                title=None,
                scale=alt.Scale(scheme="cividis", type="symlog", constant=0.01),
            ),
            tooltip=["leaf:N", "time:Q", "what:N", alt.Tooltip("value:Q", format=".4g")],
        )
        .add_params(chosen)
        .properties(width=2 * WIDTH, height=alt.Step(18))
    )
    return _spec(chart)


def _cells(timeline: Timeline) -> list[Spec]:
    leaves = [(e, leaf) for e in exchanges_of(timeline) for leaf in leaves_of(timeline, e)]
    found = []
    for order, (exchange, leaf) in enumerate(leaves):
        for time, row in timeline:
            for name, title in BY_LEAF.items():
                value = _value(row, exchange, name, leaf)
                if value is not None:
                    cell = {"time": time, "leaf": f"{exchange}{leaf}", "order": order}
                    found.append({**cell, "what": title, "value": value})
    return found


def _value(row: Any, exchange: str, name: str, leaf: str) -> float | None:
    if name != "alpha_share":
        return row.get(f"{exchange}{name}/{leaf}")
    promised = row.get(f"{exchange}alpha_promised/{leaf}")
    measured = row.get(f"{exchange}alpha_hat/{leaf}")
    return measured / promised if promised and measured is not None else None


def _spec(chart: Any) -> Spec:
    return chart.configure_view(strokeWidth=0).to_dict()
