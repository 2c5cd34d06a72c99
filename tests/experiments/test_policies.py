"""The study of policies at equal bytes: its records, its table, and a run from flags to picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ef_optax as ef
from experiments import policies, policies_report, storage
from experiments.policies_report import Records
from experiments.small_runs import Task
from tests.experiments.test_studies import results

SMALL = ("--epochs=2", "--stretches=2", "--train_images=64", "--seeds=2", "--ratio=0.1")
SMALL += ("--hidden=16",)
FLAGS = {"dataset": "digits", "workers": 8, "batch_size": 2, "seeds": 2}
ABOUT = {"flags": FLAGS, "steps": 4, "training_images": 64, "parameters": 100, "hardware": "paper"}


def places(folder: Path) -> list[str]:
    """The flags for records and results in a folder."""
    return [f"--records={folder / 'r.jsonl'}", f"--out_dir={folder / 'out'}"]


def records(path: Path, *rows: dict[str, Any]) -> Records:
    made = Records(path)
    made.add({"about": ABOUT})
    for row in rows:
        made.add({"accuracy": [90.0, 92.0], "loss": [0.2, 0.4]} | row)
    return made


def test_a_policy_is_compared_with_the_level_of_its_bytes(tmp_path: Path) -> None:
    made = records(
        tmp_path / "r.jsonl",
        {"method": "dense", "bytes": [9e6, 9e6]},
        {"method": "l_greco", "bytes": [900.0, 1100.0], "accuracy": [91.0, 93.5]},
        {"ratio": 0.01, "ups": 0, "bytes": [2000.0, 2000.0]},
        {"ratio": 0.005, "ups": 2, "bytes": [1010.0, 1010.0]}
        | {"accuracy": [90.5, 92.0], "loss": [0.1, 0.3]},
    )
    again = Records(tmp_path / "r.jsonl")
    assert (again.methods, again.levels) == (made.methods, made.levels)
    text = policies_report.text(again)
    # Differences by seed: 0.5 and 1.5 points, a mean of 1 with a standard error of a half.
    assert (
        "| `l_greco` | 1.0 | 0.50% | 1.0 | 92.25 ± 1.77 | 91.25 ± 1.06 | +1.00 ± 0.50 "
        "| 0.300 | 0.200 | +0.100 ± 0.000 |" in text
    )
    assert "| dense | 9,000 |  |  | 91.00 ± 1.41 |" in text and "at most 1.5%" in text
    made.add({"method": "accordion", "bytes": [1030.0, 1030.0], "accuracy": [1.0], "loss": [1.0]})
    with pytest.raises(storage.OutputError, match="no fixed level has the bytes of accordion"):
        made.pairs()


def test_the_committed_records_are_complete_and_at_equal_bytes() -> None:
    made = Records(Path(policies.RECORDS))
    assert {"accordion", "l_greco", "within_bytes", "hold_bytes"} <= made.methods.keys()
    for name, row, level in made.pairs():
        assert abs(np.mean(row["bytes"]) / np.mean(level["bytes"]) - 1) <= 0.015, name
        assert len(row["accuracy"]) == len(level["accuracy"]) == made.about["flags"]["seeds"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods=none",), "--methods=none: choose of dense, within_bytes"),
        (("--hidden=8,0",), "--hidden=8,0: give the width of every hidden layer"),
        (("--stretches=5",), "--stretches=5: it must divide --epochs=12"),
        (("--ratio=0",), "--ratio=0: top-k keeps a ratio"),
        (("--report",), "no run is there yet"),
    ],
)
def test_flags_that_cannot_be_leave_nothing_there(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=says):
        policies.main(["policies", *words, *places(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_records_of_other_flags_are_not_continued(tmp_path: Path) -> None:
    records(tmp_path / "r.jsonl")
    with pytest.raises(SystemExit, match=r"r\.jsonl was made with --train_images=None; give the"):
        policies.main(["policies", *SMALL, *places(tmp_path)])


def test_the_level_with_the_same_bytes() -> None:
    """Whole messages, and a third of the way from one size of k to the next."""
    policies.FLAGS.unparse_flags()
    policies.FLAGS(["policies", *SMALL])
    shapes = policies.shapes(Task(policies.FLAGS))
    bytes_of = lambda ratio: ef.message_bits(ef.top_k(ratio), shapes) / 8  # noqa: E731
    exact = policies.level_of(bytes_of(0.23), shapes, 6)
    assert bytes_of(exact.up) == bytes_of(0.23) and exact.ups == 6
    size = (2 * bytes_of(exact.down) + bytes_of(exact.up)) / 3
    between = policies.level_of(size, shapes, 6)
    assert (bytes_of(between.down), between.ups) == (bytes_of(exact.down), 2)
    seen = SimpleNamespace(task=SimpleNamespace(stretches=6), history=[])
    sent = 0.0
    for _ in range(6):
        seen.history.append(None)
        sent += ef.message_bits(between.choose(seen), shapes) / 8
    assert sent == pytest.approx(6 * size)
    with pytest.raises(policies.UsageError, match="no fixed ratio sends 1 bytes a step"):
        policies.level_of(1.0, shapes, 6)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_policies(tmp_path: Path) -> None:
    """A policy on the host and its level; what is finished does not run again."""
    path, command = tmp_path / "r.jsonl", (*SMALL, "--methods=within_bytes")
    results(policies.main, tmp_path / "out", *command, f"--records={path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("method") for row in rows] == [None, "within_bytes", None]
    assert "| `within_bytes` |" in (tmp_path / "out" / "table.md").read_text()
    assert np.mean(rows[1]["bytes"]) == pytest.approx(np.mean(rows[2]["bytes"]), rel=0.015)
    for row in rows[1:]:
        assert len(row["accuracy"]) == len(row["loss"]) == 2 and min(row["loss"]) > 0
    before = path.read_bytes()
    results(policies.main, tmp_path / "again", *command, f"--records={path}")
    assert path.read_bytes() == before
