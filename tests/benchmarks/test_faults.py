"""The figures of the trials: what counts as an end that says why, and as the same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults


def trial(**facts: Any) -> dict[str, Any]:
    return {"kind": "trial", "processes": 2, "clear": True, "waited": 1.0, **facts}


def test_figures_count_what_is_late_or_unclear_as_a_failure() -> None:
    found = [
        trial(),
        trial(waited=3.25),
        trial(clear=False),
        trial(waited=faults.LIMIT + 0.5),
        {"kind": "ended", "processes": 2, "equal": True, "kills": 3},
        {"kind": "ended", "processes": 2, "equal": False, "kills": 1},
        {"kind": "whole", "processes": 4, "rows": []},
    ]
    (line,) = faults.report(found).splitlines()
    assert line.startswith("2 processes: after 2 of 4 kills ")
    assert f"within {faults.LIMIT} s (median 3.2 s, longest {faults.LIMIT}.5 s)" in line
    assert "; 1 of 2 runs, killed 4 times in all," in line


def test_the_line_that_says_why_is_ours_or_that_of_jax() -> None:
    jax_says = f"F1129 client.h:80] {faults.WORDS[-1]}; see the other task logs"
    ours = "error: --multihost: another process ended or cannot be reached (Gloo); start all"
    assert faults._reason(["[Gloo] Rank 0", jax_says, "Additional information"]) == jax_says
    assert faults._reason([jax_says, ours]) == ours
    assert faults._reason(["error: --lr=sgdm=-1", "Traceback"]) == ""


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--processes=2,1", "--processes=2,1: give numbers of at least 2"),
        ("--trials=0", "--trials=0: give a number of at least 1"),
        ("--report", "has no records.jsonl yet"),
    ],
)
def test_flags_are_checked_before_anything_is_killed(
    flag: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", flag, f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        faults.main()
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
