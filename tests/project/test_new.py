"""``make new``: every kind is written where it belongs, tidy, with a test that fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT
from tools import new

ROOMS = ("ef_optax", "tests", "docs", "experiments", "benchmarks", "tools")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with a new part of every kind, one of a kind's rooms each."""
    root = tmp_path_factory.mktemp("copy")
    for room in ROOMS:
        ignore = shutil.ignore_patterns("__pycache__", "*.png", "reference")
        shutil.copytree(ROOT / room, root / room, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for kind in new.kinds():
        plan = tomllib.loads((new.TEMPLATES / kind / "kind.toml").read_text(encoding="utf-8"))
        for room in plan.get("rooms", [""]):
            new.tidy(new.render(kind, f"my_{room or kind}", room, root))
    return root


def test_kinds_are_those_of_the_guide() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind in new.kinds():
        assert f"make new KIND={kind} NAME=" in guide
    assert set(new.kinds()) == {"compressor", "rule", "transport", "policy", "experiment"}


def test_what_is_written_is_tidy(copy: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=copy, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout
    for path in copy.rglob("*my_*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_every_part_is_in_its_lists_and_has_a_failing_test(copy: Path) -> None:
    tests = sorted(copy.glob("tests/**/test_my_*.py"))
    assert len(tests) == len(list(copy.glob("[e]*/**/my_*.py"))) >= len(new.kinds())
    for path in tests:
        text, name = path.read_text(encoding="utf-8"), path.stem.removeprefix("test_")
        assert "pytest.fail(" in text and "new_name" not in text
        mentions = [
            p for p in copy.rglob("*") if p.suffix in (".py", ".md") and name in p.read_text()
        ]
        assert len(mentions) >= 3, f"{name} is only in {mentions}"


@pytest.mark.parametrize(
    ("kind", "name", "room", "text"),
    [
        ("optimizer", "mine", "", "KIND=optimizer: choose one of compressor"),
        ("rule", "My-Rule", "", "NAME=My-Rule: use lower-case"),
        ("rule", "class", "", "NAME=class"),
        ("rule", "ef21", "", "feedback/ef21.py, .* exists already"),
        ("compressor", "mine", "cellar", "ROOM=cellar: choose one of quantize"),
        ("rule", "mine", "quantize", "ROOM=quantize"),
    ],
)
def test_what_cannot_be_made_is_refused(kind: str, name: str, room: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        new.render(kind, name, room)
    with pytest.raises(SystemExit, match="error: "):
        new.main([f"--kind={kind}", f"--name={name}", f"--room={room}"])


def test_a_list_is_found_and_ends_where_it_ends() -> None:
    text = 'x = [\n    # one\n    "b",\n    "d",\n    # two\n    "a",\n]\n'
    assert new.insert(text, "# one", '"c",', sort=True).split("\n")[2:5] == [
        '    "b",',
        '    "c",',
        '    "d",',
    ]
    assert new.insert(text, "# two", '"e",').endswith('    "a",\n    "e",\n]\n')
    with pytest.raises(ValueError, match="no list"):
        new.insert(text, "# three", '"c",')
