"""The pages of the documentation are true: their Python blocks run, their links lead somewhere.

Sybil reads and evaluates the blocks. Its pytest plugin would make an item of every block, and the
blocks of a page share their names, so pytest-xdist would have to keep a page in one process; here a
page is one test.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from sybil import Document, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import ef_optax as ef
from docs import tables
from tests.paths import ROOT

PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DEAR = {"activations.md", "frameworks.md", "where-things-go.md"}
"""Pages with many programs, which run beside the notebooks."""

SYBIL = Sybil([PythonCodeBlockParser(doctest_optionflags=OPTIONS)])


def examples(page: Path) -> Document:
    return SYBIL.parse(page)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.notebooks if p.name in DEAR else ())
        for p in PAGES
        if [*examples(p)]
    ],
    ids=lambda p: p.name,
)
def test_python_blocks_run(page: Path, standard_promotion) -> None:
    """Top to bottom in one namespace; a block with ``>>>`` must give the output it shows."""
    document = examples(page)
    document.namespace["__name__"] = "__main__"
    for example in document:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_compressors_is_fresh() -> None:
    """docs/compressors.md is what its script writes."""
    written = (ROOT / "docs" / "compressors.md").read_text(encoding="utf-8")
    assert written == tables.page(), "run python -m docs.tables"


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(ef.__version__)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE
    )
