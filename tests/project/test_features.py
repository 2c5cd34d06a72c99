"""The table of features is true: what it names exists. What is missing, test_complete.py finds."""

from __future__ import annotations

import re

import pytest

import ef_optax as ef
from tests.paths import ROOT

TABLE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
NOT_YET = "not yet"


def rows() -> list[tuple[str, str, str]]:
    """(feature, public name, test) of every row of every table."""
    cells = [
        [cell.strip() for cell in line.strip()[1:-1].split("|")]
        for line in TABLE.splitlines()
        if line.startswith("| ") and not line.startswith("| row ")
    ]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return [(a, b, c) for a, b, c in cells]


def names(text: str) -> set[str]:
    return set(re.findall(r"\bef\.([A-Za-z_]\w*(?:\.\w+)*)", text))


def test_every_name_in_the_table_exists() -> None:
    missing = []
    for name in sorted(set().union(*(names(row[1]) for row in rows()))):
        target = ef
        for part in name.split("."):
            target = getattr(target, part, None)
        if target is None:
            missing.append(name)
    assert not missing, f"docs/features.md names what ef_optax does not have: {missing}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_row_is_held_by_a_test_or_says_not_yet(row: tuple[str, str, str]) -> None:
    feature, name, test = row
    if name == NOT_YET:
        assert test == "", f"{feature}: a test is named for what is not built yet"
        return
    assert name, f"{feature}: neither a name nor '{NOT_YET}'"
    found = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", test)
    assert found, f"{feature}: name the test that holds it"
    for path, function in found:
        source = ROOT / path
        assert source.is_file(), f"{feature}: {path} does not exist"
        if function:
            assert f"def {function}(" in source.read_text(encoding="utf-8"), (
                f"{feature}: {path} has no {function}"
            )
