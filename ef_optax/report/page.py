"""The page: tables, advice and charts in one HTML file that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from ef_optax.report import charts
from ef_optax.report.advice import Advice, advise
from ef_optax.report.comparison import Gap, gaps, uncompressed
from ef_optax.report.runs import Method, ReportError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 1120px;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: 0.8rem 0 } th, td { padding: 0.25rem 0.9rem 0.25rem 0;
       text-align: left; vertical-align: top; border-bottom: 1px solid #ccc }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.warning::before { content: "! "; font-weight: bold } .note { color: #555 }
"""

_DRAW = """
for (const chart of document.querySelectorAll('script[data-chart]'))
  vegaEmbed('#' + chart.dataset.chart, JSON.parse(chart.textContent),
            {renderer: 'svg', actions: false});
"""


def page(
    methods: Sequence[Method],
    title: str,
    *,
    bandwidth: float | None = None,
    dense: str | None = None,
) -> str:
    """The report as the text of an HTML file.

    Args:
      methods: what was run.
      title: the heading.
      bandwidth: of a worker's link in bits per second, for the axis of seconds.
      dense: the name of the uncompressed method; None to find it by its bytes.
    """
    parts = [f"<h1>{_text(title)}</h1>", "<h2>Is the gap closed?</h2>"]
    parts += [_table(gaps(methods, dense), dense or uncompressed(methods))]
    parts += ["<h2>Advice</h2>", _advice(advise(methods), methods)]
    specs: list[charts.Spec] = []

    def draw(heading: str, note: str, spec: charts.Spec | None) -> None:
        if spec is not None:
            parts.append(f"<h2>{_text(heading)}</h2><p class='note'>{_text(note)}</p>")
            parts.append(f"<div id='chart{len(specs)}'></div>")
            parts.append(
                f"<script type='application/json' data-chart='chart{len(specs)}'>"
                f"{_json(spec)}</script>"
            )
            specs.append(spec)

    draw(
        "Accuracy and loss",
        "Means over the seeds; bands from the lowest to the highest. Bytes and seconds are on a "
        "logarithmic axis, and so are losses.",
        charts.curves(methods, bandwidth),
    )
    for method in methods:
        draw(
            f"{method.name}: leaf by leaf",
            "Of the first seed; see ef_optax.measure.statistics for the definitions.",
            charts.by_leaf(method),
        )
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f"{_library() if specs else ''}</body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _table(found: Sequence[Gap], dense: str | None) -> str:
    if not found:
        return "<p>No method has a test accuracy.</p>"
    rows = [["method", "last test accuracy", "below the uncompressed run", ""]]
    for one in found:
        spread = "" if one.deviation is None else f" ± {100 * one.deviation:.2f}"
        gap, conclusion = "", one.conclusion
        if one.method == dense:
            conclusion = "the uncompressed run"
        elif one.gap is not None:
            gap = f"{100 * one.gap:.2f}" + (
                "" if one.error is None else f" ± {100 * one.error:.2f}"
            )
        rows.append([one.method, f"{100 * one.accuracy:.2f}{spread}", gap, conclusion])
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    note = (
        "In per cent and percentage points; ± is the standard deviation over the seeds, and for "
        "the difference its standard error. "
        + ("" if dense else "No uncompressed run was found; name one with --dense.")
    )
    return f"<table><tr>{head}</tr>{lines}</table><p class='note'>{_text(note)}</p>"


def _advice(found: Sequence[Advice], methods: Sequence[Method]) -> str:
    if not any(m.monitored() for m in methods):
        return (
            "<p>Nothing was monitored. Put ef_optax.monitor around the chain, and write "
            "ef_optax.measure.summary(opt_state, by='leaf') under \"monitor\" into metrics.jsonl "
            "(experiments.train does so with --monitor).</p>"
        )
    if not found:
        return "<p>Nothing to change: no leaf breaks its promise and no residual is large.</p>"
    lines = [
        f"<tr class='{one.kind}'><td class='{one.kind}'>{_text(one.method)}</td>"
        f"<td>{_text(one.where)}</td><td>{_text(one.reason)}</td><td>{_text(one.remedy)}</td></tr>"
        for one in found
    ]
    head = "<tr><th>method</th><th>where</th><th>reason</th><th>what to do</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _json(spec: charts.Spec) -> str:
    """JSON that may stand in a script element, whatever names it holds."""
    text = json.dumps(spec, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def bundler() -> Any:
    """What puts the charting library into the page, which only a report needs."""
    try:
        import vl_convert
    except ImportError:
        raise ReportError(
            "the report needs vl-convert-python: pip install 'ef-optax[report]'"
        ) from None
    return vl_convert


def _library() -> str:
    """The charting library, and the call that draws every chart; nothing is loaded from elsewhere.

    The charts are data and not code, because the bundler may undo the escapes of names.
    """
    version = charts.altair().SCHEMA_VERSION.rpartition(".")[0]  # that of the charts, "v6.1"
    code = bundler().javascript_bundle(_DRAW, vl_version=version).replace("</script", "<\\/script")
    return f"<script type='module'>\n{code}\n</script>\n"
