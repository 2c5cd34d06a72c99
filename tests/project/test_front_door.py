"""What a user sees first: the names of ``ef_optax``, and where the others are."""

from __future__ import annotations

import inspect
import re
import tomllib

import pytest

import ef_optax as ef
from docs import reference
from tests.paths import ROOT
from tests.public import public_names


def test_tab_completion_offers_the_public_names_and_nothing_else() -> None:
    assert sorted(ef.__all__) == sorted(set(ef.__all__))
    assert dir(ef) == sorted([*ef.__all__, "__version__"])


def test_the_names_to_begin_with_exist_and_stand_first() -> None:
    table = ef.__doc__.split("=====\n")[1]
    first = re.findall(r"``(\w+)``", table)
    assert len(first) == 10
    assert set(first) - {"ef21"} <= set(ef.__all__[:10])
    links = re.findall(r"ef_optax\.(\w+)", reference.pages()["index.md"])
    assert links[:10] == first
    for name in first:  # each shows how it is used
        assert ">>> " in inspect.getdoc(getattr(ef, name))


def test_every_public_name_has_one_home() -> None:
    """Except the type of all compressors, and the state that every rule carries."""
    homes: dict[str, list[str]] = {}
    for path in public_names():
        home, _, name = path.rpartition(".")
        homes.setdefault(name, []).append(home)
    several = {name for name, found in homes.items() if len(found) > 1}
    assert several == {"Compressor", "ExchangeState"}


def test_a_name_of_a_submodule_is_pointed_to() -> None:
    with pytest.raises(AttributeError, match="ef_optax.exchanges.two_shot"):
        ef.two_shot  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'top_q'"):
        ef.top_q  # noqa: B018


def test_every_state_of_a_rule_is_among_the_states() -> None:
    found = set()
    for room in ("feedback", "local", "estimators", "policies", "recipes", "activations"):
        for path in (ROOT / "ef_optax" / room).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r"^class (\w+State)\(NamedTuple\)", text, re.MULTILINE))
    shared = {"ControlState", "ExchangeState", "MonitorState", "ResidualPolicyState"}
    assert found and found | shared == set(ef.states.__all__)
    assert all(inspect.getdoc(getattr(ef.states, name)) for name in ef.states.__all__)


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ef_optax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", ef.__version__)
