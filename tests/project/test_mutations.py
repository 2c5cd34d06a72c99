"""Each mutation changes a line that is there, and names tests that are there and run every time."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.mutations.__main__ import rooms
from tests.paths import ROOT


@functools.cache
def defined(file: str) -> dict[str, bool]:
    """The names of the functions of a test file, and whether all their cases are slow."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {
        node.name: "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(("room", "mutations"), rooms().items())
def test_mutations_apply_and_their_tests_exist(room, mutations) -> None:
    for mutation in mutations:
        mutation.applied((ROOT / mutation.file).read_text(encoding="utf-8"))
        assert isinstance(mutation.tests, tuple) and mutation.tests, mutation.fault
        slow = []
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), (mutation.fault, test)
            if name:
                assert name.partition("[")[0] in defined(file), (mutation.fault, test)
            slow.append(bool(name) and defined(file)[name.partition("[")[0]])
        assert not all(slow), f"make test would not notice: {mutation.fault}"


def test_there_are_enough() -> None:
    assert sum(map(len, rooms().values())) >= 60
