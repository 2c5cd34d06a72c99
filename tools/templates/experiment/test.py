"""A short run of the study ``new_name``, and what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import new_name


def test_new_name(tmp_path: Path) -> None:
    new_name.main(["new_name", f"--out_dir={tmp_path / 'out'}", "--steps=20"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["method"] for row in rows} == set(new_name.optimizers())
    pytest.fail("compare the numbers with what the study claims")
