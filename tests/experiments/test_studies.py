"""The small studies: each runs from its flags to its picture and finds what it should show."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import batch_size_table, counterexamples, processes, rates, span, storage, train

Rows = list[dict[str, Any]]


def results(main: Callable[[list[str]], None], out_dir: Path, *words: str) -> Rows:
    """Runs a study, checks its other files, and returns its measurements."""
    main(["study", *words, f"--out_dir={out_dir}"])
    assert (out_dir / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = [line for line in (out_dir / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) > 2 and len({line.count("|") for line in table}) == 1
    assert storage.read_json(out_dir / "config.json")["about"]["hardware"]
    return storage.read_rows(out_dir)


def value(rows: Rows, key: str, **where: Any) -> float:
    found = [row[key] for row in rows if key in row and where.items() <= row.items()]
    assert len(found) == 1
    return found[0]


def keep(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> None:
    """Only these methods: each further one is another program to compile."""
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in names})


@pytest.mark.slow
def test_counterexamples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, counterexamples, "sign", "ef_sign")
    rows = results(counterexamples.main, tmp_path / "out", "--runs=50")
    assert value(rows, "f", method="sign", example=1) > 0.24
    assert value(rows, "f", method="ef_sign", example=1) < -0.22
    assert value(rows, "distance_to_line", method="sign") < 1e-9
    for eps in counterexamples.EPS:
        assert value(rows, "f", method="sign", example=2, eps=eps) >= 2 * eps
        assert value(rows, "f", method="ef_sign", example=2, eps=eps) < 0.02
    assert value(rows, "norm", method="sign", example=3) > 1
    assert value(rows, "norm", method="ef_sign", example=3) < 1e-12


def test_the_three_workers_break_top_1_but_not_error_feedback() -> None:
    plain, memory = (
        np.linalg.norm(counterexamples.three_workers(method, 600)[-1])
        for method in ("top_1", "ef_top_1")
    )
    # From x = t (1, 1, 1) the gradients are t/2 (-11, 9, 9) and its shifts: what is sent is -11/2 t
    # of one entry each, a mean of -11/6 t (1, 1, 1), and x grows by 1 + 0.01 * 11/6 a round.
    np.testing.assert_allclose(plain, 3**0.5 * (1 + 0.11 / 6) ** 600, rtol=1e-3)
    assert memory < 0.1


@pytest.mark.slow
def test_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = {n: m for n, m in span.optimizers().items() if n in ("signsgd", "ef_signsgd")}
    monkeypatch.setattr(span, "optimizers", lambda: chains)
    rows = results(span.main, tmp_path / "out", "--instances=1", "--seed=1", "--epochs=300")
    at_80 = {"epoch": span.PUBLISHED_EPOCHS}
    assert value(rows, "distance", method="signsgd", **at_80) > 3.5
    assert value(rows, "test_loss", method="signsgd", **at_80) > 0.5
    assert value(rows, "distance", method="ef_signsgd", **at_80) < 0.3
    assert value(rows, "test_loss", method="ef_signsgd", **at_80) < 0.01
    assert value(rows, "distance", method="ef_signsgd", epoch=300) < 1e-4


def test_span_data_are_those_of_the_description() -> None:
    a, b, test_a, test_b = span.instance(0)
    points, labels = np.concatenate([a, test_a]), np.concatenate([b, test_b])
    np.testing.assert_array_equal(points[:, 0], labels)
    np.testing.assert_array_equal(points[:, 1:3], 1)
    np.testing.assert_array_equal(points[:, 3:].sum(1), np.where(labels > 0, 1, 5))
    assert points[:, 3:].sum(0).max() == 1  # no two points share those


@pytest.mark.slow
def test_rates_stay_within_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, rates, "ef_top_4", "top_4", "ef_random_4")
    rows = results(rates.main, tmp_path / "out", "--log_steps=9", "--runs=4")
    for method in ("ef_top_4", "ef_random_4"):
        points = [row for row in rows if row["method"] == method and "bound" in row]
        assert all(row["gradient"] <= row["bound"] for row in points)
        assert value(rows, "exponent", method=method) < -0.3
        assert value(rows, "residual", method=method) <= value(rows, "lemma_3", method=method)
    stalled, solved = (
        value(rows, "gradient", method=method, steps=512) for method in ("top_4", "ef_top_4")
    )
    assert stalled > 3 * solved


def test_constants_of_the_rates_study() -> None:
    x = np.linspace(-5, 5, 100_001)
    h = 0.4 * (np.sqrt(1 + x**2) - 1) + 0.3 * x**2 / (1 + x**2)
    slope = np.gradient(h, x)
    np.testing.assert_allclose(rates.gradient(x.astype(np.float32)), slope, atol=1e-3)
    curvature = np.gradient(slope, x)
    assert curvature.min() < 0  # not convex
    assert np.abs(curvature).max() == pytest.approx(rates.L, rel=1e-4)
    noise = 0.25 * (3 * rates.NOISE) ** 2 + 0.75 * rates.NOISE**2
    exact = rates.DIMENSION * ((slope**2).max() + noise)
    assert exact <= rates.SECOND_MOMENT < 1.001 * exact
    at_start = np.interp(1, x, h)
    assert pytest.approx(rates.DIMENSION * at_start, rel=1e-6) == rates.INITIAL_GAP


@pytest.mark.slow
def test_batch_size_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)  # the session keeps its own
    words = ["study", "--methods=ef_signsgd", "--lr=ef_signsgd=0.4", "--seeds=1", "--epochs=1"]
    words += ["--batch_sizes=700,350", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", batch_size_table.with_preset(words))
    with flagsaver.flagsaver():
        batch_size_table.main(train.FLAGS(sys.argv))
    rows = storage.read_rows(tmp_path / "out")
    assert [row["batch_size"] for row in rows] == [700, 350]
    for size in (700, 350):  # --lr is for the preset's --batch_size=128
        config = storage.read_json(tmp_path / f"out/batch{size}/config.json")
        assert config["flags"]["lr"]["ef_signsgd"] == pytest.approx(0.4 * size / 128, rel=1e-5)
        assert f"--batch_size={size}" in config["about"]["command"]
        assert "batch_sizes" not in config["about"]["command"]
    assert "| `ef_signsgd`" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/curves.png").exists()


def test_batch_size_table_states_mean_deviation_and_difference() -> None:
    accuracies = {("sgdm", 0): 0.98, ("sgdm", 1): 0.96, ("signsgd", 0): 0.9, ("signsgd", 1): 0.9}
    rows = [
        {"method": method, "seed": seed, "epoch": epoch, "test_accuracy": accuracy * epoch / 2}
        for (method, seed), accuracy in accuracies.items()
        for epoch in (1, 2)
    ]
    with flagsaver.flagsaver():
        train.FLAGS(["study"])
        text = batch_size_table.table(["sgdm", "signsgd"], {8: rows})
    assert "| `sgdm` | 97.00 ± 1.41 |  |" in text
    assert "| `signsgd` | 90.00 ± 0.00 | -7.00 |" in text


STUDY_OF = {
    path: found.group(1)
    for path in sorted((Path(span.__file__).parent / "presets").glob("*.flags"))
    if (found := re.search(r"Command: python -m experiments\.(\w+)", path.read_text()))
    and found.group(1) not in ("train", "batch_size_table", "lm")
}


@pytest.mark.parametrize("preset, name", STUDY_OF.items(), ids=[path.stem for path in STUDY_OF])
def test_presets_of_the_studies_are_complete(preset: Path, name: str) -> None:
    values = importlib.import_module(f"experiments.{name}").STUDY.flags
    values.unparse_flags()
    values([name, f"--flagfile={preset}"])
    try:
        header, given = preset.read_text().split("\n--", 1)
        for word in ("Result:", f"--flagfile=experiments/presets/{preset.name}", "Hardware:"):
            assert word in header
        for line in f"--{given}".split():
            flag, value = line.removeprefix("--").split("=")
            assert str(values[flag].value).replace("'", "").strip("[]").replace(" ", "") == value
    finally:
        for flag in values:
            values[flag].unparse()
    assert values["out_dir"].default == f"runs/{name}"
    assert preset.stem.startswith(name)


def test_every_study_has_a_preset() -> None:
    studies = {path.stem for path in Path(span.__file__).parent.glob("*.py")}
    studies = {
        name for name in studies if "STUDY" in vars(importlib.import_module(f"experiments.{name}"))
    }
    assert len(studies) >= 8
    assert studies == set(STUDY_OF.values())


def test_what_cannot_work_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            span.main(["span", f"--out_dir={tmp_path}", *words])
        message = str(caught.value.code)
        assert message.startswith("error: ")
        return message

    assert "unexpected argument 'surplus'" in refused("surplus")
    assert "epochs" in refused("--epochs=0")
    assert "Unknown command line flag" in refused("--steps=1")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert "already holds results" in refused()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    span.main(["span", "--help"])
    assert "--[no]overwrite" in capsys.readouterr().out
