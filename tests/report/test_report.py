"""The report says what the numbers say, escapes every name and opens without a network."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from ef_optax import report
from ef_optax.report import page as pages
from ef_optax.report.advice import advise, grows
from ef_optax.report.comparison import gaps
from ef_optax.report.runs import Method, read

EVIL = "<script>alert('x')</script>&\"\u2028"
EPOCHS, STEPS = 8, 10


def monitor(epoch: int, *, alpha: float, growth: float = 0.0, ratio: float = 1.0) -> dict:
    """Statistics of two leaves: one as asked, one that gives no reason for advice."""
    grown = ratio * (1 + growth * epoch)
    return {
        "steps": float(STEPS * epoch),
        "skipped_steps": 0.0,
        "relative_error": 0.9,
        "relative_error/conv1": 0.9,
        "alpha_hat/conv1": alpha,
        "alpha_promised/conv1": 0.01,
        "residual_to_gradient/conv1": grown,
        "bits_ratio/conv1": 30.0,
        f"relative_error/{EVIL}": 0.9,
        f"alpha_hat/{EVIL}": 0.02,
        f"alpha_promised/{EVIL}": 0.01,
        f"residual_to_gradient/{EVIL}": ratio,
        f"bits_ratio/{EVIL}": 30.0,
    }


def method(name: str, accuracies: list[float], rows=None, sent: float = 10.0) -> Method:
    """A method whose seeds end with these accuracies."""
    seeds = []
    for accuracy in accuracies:
        seed = []
        for epoch in range(1, EPOCHS + 1):
            row = {"epoch": epoch, "test_accuracy": accuracy * (1 - 0.5**epoch)}
            row |= {"train_loss": 1 / epoch, "test_loss": math.nan}
            if rows is not None:
                row["monitor"] = rows(epoch)
            seed.append(row)
        seed[-1]["test_accuracy"] = accuracy
        seeds.append(tuple(seed))
    return Method(name, tuple(seeds), "epoch", STEPS, sent, 2 * sent, 100.0)


def only(rows):
    return advise([method("m", [0.9], rows)])


def test_a_broken_promise_and_a_growing_residual() -> None:
    (found,) = only(lambda epoch: monitor(epoch, alpha=0.002, growth=1.0))
    assert (found.kind, found.where) == ("warning", "conv1")
    assert found.reason == "alpha-hat 0.002, promised 0.01, residual still growing"
    assert "dense" in found.remedy
    (found,) = only(lambda epoch: monitor(epoch, alpha=0.0099, growth=9.0))  # the promise holds
    assert "still growing" in found.reason and "times the gradient" in found.reason


def test_room_for_more_compression_only_if_it_is_everywhere() -> None:
    (found,) = only(lambda epoch: monitor(epoch, alpha=0.02, ratio=0.09))
    assert (found.kind, found.where) == ("hint", "all leaves")
    assert "below 0.1 of the gradient everywhere" in found.reason
    assert not only(lambda epoch: monitor(epoch, alpha=0.02, ratio=0.09, growth=0.1))


def test_large_and_steady_or_longer_than_the_values() -> None:
    found = only(lambda epoch: monitor(epoch, alpha=0.02, ratio=20.0))
    assert [one.kind for one in found] == ["hint"] * 2 and "steady" in found[0].reason
    (found,) = only(lambda epoch: monitor(epoch, alpha=0.02) | {"bits_ratio/conv1": 0.5})
    assert found.where == "conv1" and "2 times the bits" in found.reason


def test_skipped_steps_come_first() -> None:
    found = only(lambda e: monitor(e, alpha=0.02, ratio=20.0) | {"skipped_steps": 3.0})
    assert found[0].reason.startswith("3 steps were skipped")


def test_growth_compares_the_last_two_quarters() -> None:
    assert grows([1, 1, 1, 1, 1, 1, 1.2, 1.2]) and not grows([1, 2, 3, 4, 4, 4, 4.1, 4.1])
    assert not grows([1, 9]) and not grows([])


def test_gaps_and_their_spread() -> None:
    methods = [
        method("sgdm", [0.98, 0.99, 1.0], sent=100.0),
        method("top_k", [0.90, 0.91, 0.92]),
        method("ef_top_k", [0.975, 0.985, 0.995]),
        method("ef_sign", [0.9]),
        method("other", [0.5, 0.5, 0.5]),
    ]
    found = {gap.method: gap for gap in gaps(methods)}
    assert found["top_k"].gap == pytest.approx(0.08)
    assert found["top_k"].error == pytest.approx(math.sqrt(2 * 0.01**2 / 3))
    assert found["ef_top_k"].conclusion.startswith("gap closed")
    assert found["other"].conclusion == "below the uncompressed run"
    assert found["ef_sign"].conclusion == "one seed: no spread is known"
    below = [*methods[:2], method("ef_top_k", [0.95, 0.95, 0.95])]
    assert gaps(below)[2].conclusion == "50% of the gap closed"
    assert all(gap.gap is None for gap in gaps(methods[1:]))
    assert gaps(methods[1:], dense="top_k")[1].gap == pytest.approx(-0.075)


def test_expressions_are_compared_with_the_same_one_without_feedback() -> None:
    methods = [
        method("sgdm", [0.98, 0.99, 1.0], sent=100.0),
        method("compressed_mean(top_k(0.01)) | sgd(0.3)", [0.90, 0.91, 0.92]),
        method("error_feedback(top_k(0.01)) | sgd(0.3)", [0.95, 0.95, 0.95]),
    ]
    assert gaps(methods)[2].conclusion == "50% of the gap closed"


class Elements(html.parser.HTMLParser):
    """All elements of a page, and the text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.text, self.data = [], [], []

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        tag, attributes = self.found[-1] if self.found else ("", {})
        if tag == "script" and "data-chart" in attributes:
            self.data.append(json.loads(data))
            self.found.append(("", {}))
        else:
            self.text.append(data)


METHODS = [
    method(EVIL, [0.9, 0.8], lambda epoch: monitor(epoch, alpha=0.002)),
    method("sgdm", [0.98, 0.97], sent=100.0),
]


def test_names_are_escaped_and_charts_hold_the_numbers(monkeypatch) -> None:
    monkeypatch.setattr(pages, "_library", lambda: "")
    text = pages.page(METHODS, EVIL, bandwidth=8e6)
    assert "<script>alert" not in text
    seen = Elements()
    seen.feed(text)
    assert {tag for tag, _ in seen.found} <= set(
        "html head meta title style body h1 h2 p table tr th td div script".split()
    ) | {""}
    assert EVIL in "".join(seen.text)
    curves, leaves = seen.data
    panels = curves["vconcat"][0]["hconcat"]
    rows = {p["layer"][1]["encoding"]["x"]["title"]: p["data"]["values"] for p in panels}
    last = {title: [r for r in data if r["method"] == EVIL][-1] for title, data in rows.items()}
    assert sorted(r["x"] for r in last.values()) == pytest.approx(
        sorted([EPOCHS * STEPS, EPOCHS * STEPS * 10 / 1e6, EPOCHS * STEPS * 20 * 8 / 8e6])
    )
    for row in last.values():
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.85, 0.8, 0.9))
    values = leaves["data"]["values"]
    assert {(row["leaf"], row["time"]) for row in values} == {
        (leaf, epoch) for leaf in ("conv1", EVIL) for epoch in range(1, EPOCHS + 1)
    }
    shares = [r["value"] for r in values if "promised" in r["what"] and r["leaf"] == "conv1"]
    assert shares == pytest.approx([0.2] * EPOCHS)


def write_run(folder) -> None:
    folder.mkdir()
    lines = [
        json.dumps({"method": one.name, "seed": seed, **row})
        for one in METHODS
        for seed, rows in enumerate(one.seeds)
        for row in rows
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    about = {"about": {"steps_per_epoch": STEPS, "dense_bytes": 100}}
    (folder / "config.json").write_text(json.dumps(about))
    wire = {m.name: {"message_bytes": m.message_bytes, "link_bytes": 1} for m in METHODS}
    (folder / "wire.json").write_text(json.dumps(wire))


def test_folders_are_read(tmp_path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    found = read([tmp_path / "a", tmp_path / "b"])
    assert [m.name for m in found] == [f"{f}: {m.name}" for f in "ab" for m in METHODS]
    assert found[0].seeds[1][-1]["test_accuracy"] == 0.8 and len(found[0].monitored()) == EPOCHS
    assert (found[1].message_bytes, found[1].dense_bytes, found[1].steps_per_unit) == (100, 100, 10)
    (tmp_path / "b" / "config.json").write_text("{")
    with pytest.raises(report.ReportError, match=r"config\.json: not valid JSON"):
        read([tmp_path / "b"])
    with pytest.raises(report.ReportError, match="does not exist"):
        read([tmp_path / "c"])


@pytest.mark.slow
def test_a_browser_without_a_network_draws_every_chart(tmp_path) -> None:
    """The page is one file; each chart becomes an SVG, and no name becomes an element."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on PATH; apt-get install chromium")
    write_run(tmp_path / "run")
    path = report.write([tmp_path / "run"], bandwidth=1e9)
    text = path.read_text(encoding="utf-8")
    own, _, library = text.partition("<script type='module'>")
    assert library and not re.search(r"<[^>]*\b(src|href)=", own)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * 0.0.0.0"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        timeout=200,
        text=True,
    )
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert done.returncode == 0 and drawn.count("<svg") == text.count("data-chart='") == 2
    assert "megabytes in messages" in drawn and "alert(" in drawn and "<script" not in drawn
