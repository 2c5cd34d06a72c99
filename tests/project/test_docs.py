"""The pages of the documentation are true: their Python blocks run, their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.public import public_names

PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "experiments/README.md"])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and source of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, standard_promotion) -> None:
    """Top to bottom in one namespace; a block with ``>>>`` is held to the output it shows."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page):
        if ">>> " not in source:  # the padding makes a traceback name the line of the page
            code = compile("\n" * line + source, str(page), "exec", dont_inherit=True)
            exec(code, namespace)
            continue
        example = doctest.DocTestParser().get_doctest(source, namespace, page.name, str(page), line)
        found: list[str] = []
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        runner.run(example, out=found.append, clear_globs=False)
        assert not found, "".join(found)
        namespace.update(example.globs)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_compressors_is_fresh() -> None:
    """docs/compressors.md is what its script writes, and every compressor is in it."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    written = (ROOT / "docs" / "compressors.md").read_text(encoding="utf-8")
    assert written == tables.page(), "run python -m docs.tables"
    listed = set(re.findall(r"[a-z_0-9]+(?=\()", " ".join(tables.calls())))
    missing = compressors() - listed - NO_NUMBERS
    assert not missing, f"add a call of each of {missing} to docs/tables.py"


NO_NUMBERS = {"dense", "per_leaf", "scheduled", "dgc_warmup"}
"""Compressors whose message is decided elsewhere: by a transformation, a policy, a schedule."""


def compressors() -> set[str]:
    """The public functions that return a Compressor."""
    return {
        name.rpartition(".")[2]
        for name, value in public_names().items()
        if inspect.isfunction(value) and value.__annotations__.get("return") == "Compressor"
    }
