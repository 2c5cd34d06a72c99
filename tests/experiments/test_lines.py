"""Lines of JSON that outlive a kill: half of one is dropped, and the next takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import lines


def test_half_a_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines.append(path, {"kind": "about"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "run", "meth')
    assert lines.read(path) == [{"kind": "about"}]
    lines.append(path, {"kind": "model"})
    assert lines.read(path) == [{"kind": "about"}, {"kind": "model"}]


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert lines.read(path) == []
    path.write_text("{\n{}\n")
    with pytest.raises(lines.OutputError, match="records.jsonl: damaged line"):
        lines.read(path)
