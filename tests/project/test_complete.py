"""The tests that run over all names, the tables and the site forget no public name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest

from docs import reference, tables
from tests.compressors.pool import CASES
from tests.exchanges.pool import EXCHANGES
from tests.feedback.rules import ALL, COMPRESSED, EVERY
from tests.paths import ROOT
from tests.public import public_names

PUBLIC = public_names()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def called(makers: Iterable[Callable]) -> set[str]:
    """The names of the functions that the makers in a table call, or are themselves."""

    def names(code: CodeType) -> set[str]:
        inner = [const for const in code.co_consts if isinstance(const, CodeType)]
        return set(code.co_names).union(*map(names, inner))

    makers = list(makers)
    return {make.__name__ for make in makers}.union(*(names(make.__code__) for make in makers))


def reached(makers: Iterable[Callable]) -> set[str]:
    """The public functions that run when these makers do, called by them or by others."""
    seen = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        for make in makers:
            make()
    finally:
        sys.setprofile(None)
    return {name for name, function in FUNCTIONS.items() if function.__code__ in seen}


CODECS = called([case.make for case in CASES.values()]) | called(EXCHANGES.values())
RULES = called(ALL.values()) | called(COMPRESSED.values())


def room(function: Any) -> str:
    return function.__module__.split(".")[1]


def own(name: str) -> str:
    return name.rpartition(".")[2]


def compressors() -> list[str]:
    """The functions that make one, but for those that make transports, and choices of leaves.

    A choice is a ``per_leaf`` of given compressors, made from measurements of given leaves.
    """
    return [
        name
        for name, function in FUNCTIONS.items()
        if function.__annotations__.get("return") == "Compressor"
        and "Transport" not in function.__annotations__.values()
        and not {"gradients", "norms"} & set(function.__annotations__)
    ]


def rules() -> list[str]:
    """The transformations that send something."""
    return [
        name
        for name, function in FUNCTIONS.items()
        if room(function) in ("feedback", "local", "recipes")
        and {"compressor", "axis_name"} & set(inspect.signature(function).parameters)
    ]


def test_what_is_looked_at_is_found() -> None:
    assert len(compressors()) > 50 and len(rules()) > 30
    assert {"top_k", "exchanges.two_shot"} <= set(compressors())
    assert {"ef21", "local.cser"} <= set(rules())


@pytest.mark.parametrize("name", compressors())
def test_every_compressor_is_in_a_pool(name: str) -> None:
    pools = CODECS | RULES if name.startswith("policies.") else CODECS
    assert own(name) in pools, (
        f"ef.{name}: add a case of it to tests/compressors/pool.py, or to tests/exchanges/pool.py "
        "if its message depends on other workers or leaves"
    )


@pytest.mark.parametrize("name", rules())
def test_every_rule_is_in_the_list(name: str) -> None:
    assert own(name) in RULES, f"ef.{name}: add it to RULES of tests/feedback/rules.py"


def test_every_estimator_is_part_of_a_rule_in_the_list() -> None:
    estimators = {name for name, function in FUNCTIONS.items() if room(function) == "estimators"}
    missing = estimators - {"query_points"} - reached(EVERY.values())
    assert not missing, f"add rules with {missing} to WITH_POINTS of tests/feedback/rules.py"


NO_NUMBERS = {"auto", "carried", "delayed", "dense", "per_leaf", "scheduled", "dgc_warmup"}
"""Compressors whose message depends on a transport, a transformation, a policy or a schedule."""


def test_every_compressor_is_in_the_table_of_numbers() -> None:
    listed = set(re.findall(r"[a-z_0-9]+(?=\()", " ".join(tables.calls())))
    fixed = {own(name) for name in compressors() if not name.startswith("policies.")}
    missing = fixed - listed - NO_NUMBERS
    assert not missing, f"add a call of each of {missing} to docs/tables.py"


def test_every_function_is_in_the_table_of_features() -> None:
    listed = set(re.findall(r"\bef\.((?:\w+\.)*\w+)", read("docs/features.md")))
    kit = {name for name in FUNCTIONS if name.startswith("extend.")}  # has a page of its own
    missing = sorted(set(FUNCTIONS) - kit - listed)
    assert not missing, f"add a row of docs/features.md for each of {missing}"


def test_every_algorithm_of_the_graph_has_a_public_name() -> None:
    for algorithm, name in reference.algorithms().items():
        assert name.removeprefix("ef_optax.") in PUBLIC, f"{algorithm} is built by no {name}"


def test_every_name_is_in_the_reference() -> None:
    """The site is generated, so this fails if the generator leaves something out."""
    text = "\n".join(reference.pages().values())
    documented = re.findall(r"^\.\. auto(?:class|function):: (\S+)::(\S+)$", text, re.MULTILINE)
    names = {f"{module}.{name}" for module, name in documented}
    names |= set(re.findall(r"^\.\. py:data:: (\S+)", text, re.MULTILINE))
    assert len(names) > 200
    ids = {id(value) for name, value in reference.public().items() if name in names}
    missing = [
        name
        for name, value in PUBLIC.items()
        if not isinstance(value, ModuleType) and id(value) not in ids
    ]
    assert not missing, f"docs/reference.py makes no page for {missing}"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
