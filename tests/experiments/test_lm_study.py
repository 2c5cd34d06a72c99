"""The study of the language model: what runs, what is written, and tables from numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import lm, lm_study, lm_study_report, storage
from experiments.lm_study import METHODS, RATES
from experiments.lm_study_report import Records
from experiments.transformer import SIZES, Size
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("standard_promotion")

EF14, PLAIN = "AdamW, top-k, EF14", "AdamW, top-k, no memory"


def records(path: Path, **finals: dict[Any, float]) -> Records:
    """Two evaluations and four training losses a run; dense sends 1 MB, others 10 kB."""
    made = Records(path)
    about = {"steps": 40, "dense_bytes": 10**6, "tokens_per_step": 512, "parameters": 250_000}
    made.add({"setting": "0.2M", "about": about | {"hardware": "paper"}})
    for name, losses in finals.items():
        name = {"ef14": EF14, "plain": PLAIN}.get(name, name)
        size = 10**6 if name in ("AdamW", "Muon") else 10**4
        kind = "reduce" if size == 10**6 else "gather"
        wire = {"message_bytes": size, "link_bytes": 0, "rounds": [[kind, size, False]]}
        made.add({"setting": "0.2M", "method": name, "wire": wire, "expression": METHODS[name]})
        for (rate, seed), loss in losses.items():
            row = {"setting": "0.2M", "method": name, "rate": rate, "seed": seed}
            train = [4.0, 3.5, 2.5, loss]  # of steps 5, 15, 25 and 35
            made.add(row | {"train": train, "held_out": [3.0, loss]})
    return made


def test_tables_have_the_best_rate_and_the_gap_to_the_optimizer_of_the_same_kind(
    tmp_path: Path,
) -> None:
    made = records(
        tmp_path / "r.jsonl",
        AdamW={(0.01, 0): 2.0, (0.003, 0): 2.5},
        Muon={(0.01, 0): 1.8},
        ef14={(0.01, 0): 2.3, (0.003, 0): 2.1, (0.003, 1): 2.2, (0.003, 2): 2.3},
        plain={(0.01, 0): 1e30},
    )
    again = Records(tmp_path / "r.jsonl")
    assert again.runs == made.runs and again.wire == made.wire
    tables = lm_study_report.tables(again, "0.1s")
    tokens = tables["The same tokens"]
    assert f"| {EF14} | 0.003 (2) | 3 | 2.200 ± 0.100 | +0.200 | 10,000 | 100x | 0.40 |" in tokens
    assert "| Muon | 0.01 (1) | 1 | 1.800 | +0.000 | 1,000,000 | 1x | 40.00 |" in tokens
    assert f"| {PLAIN} | 0.01 (1) | 1 | lost | lost |" in tokens
    same = tables["The same bits, with and without a memory"]
    assert "| AdamW | top-k | 2.000 | lost | 2.200 ± 0.100 |  |  |" in same
    # Twenty dense steps are 20 MB: all forty steps of the sparse one, whose last value is at 35.
    budgets = tables["The budget of 20 dense steps"].splitlines()
    (row,) = (line for line in budgets if line.startswith(f"| {EF14}"))
    assert row.split(" | ")[1] == "2.20 (40)"
    (row,) = (line for line in budgets if line.startswith("| AdamW |"))
    assert row.split(" | ")[1] == "3.00 (20)"  # the middle of the second value and the third
    assert PLAIN not in tables["The budget of 20 dense steps"]
    assert "Sizes and lengths" not in tables


def test_sizes_and_lengths_have_the_gap_to_dense_training_of_their_own(tmp_path: Path) -> None:
    made = records(
        tmp_path / "r.jsonl",
        AdamW={(0.01, 0): 2.0},
        Muon={(0.01, 0): 1.8},
        ef14={(0.01, 0): 2.25},
    )
    longer = lm_study.STAGES["length"].setting
    assert longer == "0.2M, 1000 steps" and lm_study.STAGES["leading"].setting == "0.2M"
    made.add({"setting": longer, "about": made.about["0.2M"] | {"steps": 1000}})
    for name, loss in (("AdamW", 1.5), (EF14, 1.625)):
        row = {"setting": longer, "method": name, "rate": 0.01, "seed": 0}
        made.add(row | {"train": [2.0, 1.9], "held_out": [loss]})
    assert lm_study_report.tables(made, "0.1s")["Sizes and lengths"].splitlines() == [
        "| method | 250,000 parameters, 40 steps | 250,000 parameters, 1,000 steps |",
        "| --- | --: | --: |",
        "| AdamW | 2.000 | 1.500 |",
        f"| {EF14} | +0.250 | +0.125 |",
    ]


def test_a_rate_is_tuned_by_steps_and_nothing_known_runs_again() -> None:
    tried = []

    def loss(rate: float, seed: int) -> float:
        tried.append(rate)
        return abs(np.log10(rate) + 1.6)

    assert lm_study.tune(loss) == 0.03
    assert set(tried) == {0.003, 0.01, 0.03, 0.1}
    assert lm_study.is_tuned(lambda rate, seed: loss(rate, seed) if rate in tried else None)
    assert not lm_study.is_tuned(lambda rate, seed: 1.0 if rate == 0.01 else None)
    assert lm_study.tune(lambda rate, seed: rate) == 0.001


def test_every_method_and_stage_can_be_made() -> None:
    for name, text in METHODS.items():
        assert text.count("PEAK") == 1, name
        lm_study.build(text, 200, 0.01)
    for stage in lm_study.STAGES.values():
        assert set(stage.methods) <= set(METHODS)
    assert RATES[lm_study.MIDDLE] == 0.01 and len(set(METHODS.values())) == len(METHODS)


def test_what_cannot_work_is_one_line(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{\n")
    for words, message in (
        (["--stages=tune"], "'tune' is none of leading"),
        (["--stages=tuned"], "give --data_dir"),
        (["--report", f"--records={damaged}"], "damaged line"),
        (["--report", f"--records={tmp_path / 'none.jsonl'}"], "are not there yet"),
    ):
        with pytest.raises(SystemExit, match=message):
            lm_study.main(["lm_study", *words, f"--out_dir={tmp_path / 'out'}"])


def test_the_documentation_shows_the_tables_of_the_records() -> None:
    page = (ROOT / "docs" / "language-models.md").read_text(encoding="utf-8")
    made = Records(ROOT / "experiments" / "records" / "lm_study.jsonl")
    for name, table in lm_study_report.tables(made, "10ms").items():
        assert table in page, f"{name}: python -m experiments.lm_study --report"


@pytest.mark.slow
def test_a_run_is_that_of_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for all rates gives what the job gives with the rate as a number in it."""
    monkeypatch.setitem(SIZES, "0.2M", Size(layers=1, width=16, heads=2))
    text = tmp_path / "a.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    made = Records(tmp_path / "records.jsonl")
    lm_study.train(lm_study.Stage("0.2M", (EF14,), "middle"), str(text), made)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines][0] == ["about", "setting"]
    words = [*"--simulate --steps=200 --eval_every=40 --eval_tokens=8192 --batch_size=1".split()]
    words += [f"--data_dir={text}", f"--out_dir={tmp_path / 'lm'}"]
    words += ["--methods=" + METHODS[EF14].replace("PEAK", "0.01")]
    monkeypatch.setattr("sys.argv", ["lm", *words])
    lm.main(lm.sys.argv)
    rows = storage.read_rows(tmp_path / "lm")
    run = made.runs["0.2M", EF14, 0.01, 0]
    np.testing.assert_allclose(run["held_out"], [row["test_loss"] for row in rows], rtol=2e-3)
    assert made.wire["0.2M", EF14] == next(
        iter(storage.read_json(tmp_path / "lm" / "wire.json").values())
    )
