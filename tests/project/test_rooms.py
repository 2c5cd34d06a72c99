"""The house: which room may import from which, and what no file may be."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import ef_optax as ef
from tests.paths import ROOT
from tests.public import public_names

PACKAGE = ROOT / "ef_optax"

ORDER = (
    ("_numeric",),
    ("_bits",),
    ("_select",),
    ("_kernels",),
    ("_core",),
    ("_exchange",),
    ("compressors",),
    ("exchanges",),
    ("_rules",),
    ("extend",),
    ("policies", "estimators", "activations"),
    ("feedback",),
    ("local",),
    ("recipes",),
    ("states",),
    ("parallel", "theory", "flat", "expressions"),
    ("measure", "checkpoint"),
    ("planner", "report"),
    ("__init__",),
)
"""The rooms from the ground up: a file imports from its own room and from those above it here."""

FLAT = {
    "__init__.py",
    "checkpoint.py",
    "expressions.py",
    "extend.py",
    "flat.py",
    "planner.py",
    "states.py",
}
"""The files that lie at the root of the package, in no room."""

MOST_LINES, MOST_LINES_OF_CODE = 400, 60
"""Of a file, and of a function (its docstring and comments do not count)."""

WRITTEN_WITH_THE_KIT = ("policies", "estimators", "feedback", "local", "recipes")
"""The rooms whose files are examples for authors: they use what is public, as an author would."""

RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import from the package."""
    for line, module, name in imported(path):
        parts = module.split(".")
        if parts[0] == "ef_optax":
            yield line, parts[1] if len(parts) > 1 else name


def test_imports_go_down() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)}:{line} imports from {other}"
        for path in FILES
        for line, other in imports(path)
        if other != room_of(path) and RANK[other] >= RANK[room_of(path)]
    ]
    assert not upwards, upwards


def test_every_room_has_its_place_and_nothing_lies_flat() -> None:
    assert {room_of(path) for path in FILES} == set(RANK)
    assert {path.name for path in PACKAGE.glob("*.py")} == FLAT


def test_our_rules_are_written_with_the_authors_kit() -> None:
    """They import from ``ef_optax.extend`` and each other's public functions, nothing private."""
    public = {
        path.rpartition(".")[2]: value
        for path, value in public_names().items()
        if not path.startswith("extend.")
    }

    def allowed(module: str, name: str) -> bool:
        if module.partition(".")[0] != "ef_optax":
            return module.partition(".")[0] in {"jax", "numpy", "optax", *sys.stdlib_module_names}
        if module == "ef_optax.extend":
            return name in ef.extend.__all__
        return public.get(name) is getattr(importlib.import_module(module), name, ...)

    private = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name or module} from {module}"
        for path in FILES
        if room_of(path) in WRITTEN_WITH_THE_KIT
        for line, module, name in imported(path)
        if not allowed(module, name)
    ]
    assert not private, private


def imported(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of everything that a file imports; no name for ``import module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def test_files_and_functions_are_short() -> None:
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        name, functions = path.relative_to(PACKAGE), ast.walk(ast.parse(text))
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"{name}: {len(text.splitlines())} lines")
        long += [
            f"{name}: {node.name} has {lines_of_code(node, text)} lines of code"
            for node in functions
            if isinstance(node, ast.FunctionDef) and lines_of_code(node, text) > MOST_LINES_OF_CODE
        ]
    assert not long, long


def lines_of_code(node: ast.FunctionDef, text: str) -> int:
    """Lines of a function without its docstring, its comments and its blank lines."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
