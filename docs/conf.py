"""The reference site, built by ``make docs``: these pages, the notebooks, and every public name.

Sphinx reads the repository as it is (links between pages are those that GitHub shows), and
``docs.reference`` writes a page for each file of the library that holds a public name. Nothing is
fetched from the network, neither while it is built nor while it is read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ef_optax as ef  # noqa: E402
from docs import reference  # noqa: E402

logger = logging.getLogger(__name__)

project, author, copyright = "ef_optax", "the ef_optax authors", "the ef_optax authors"
version = release = ef.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/**.md",
    "notebooks/*.ipynb",
    "experiments/*.md",
    "benchmarks/*.md",
]
exclude_patterns = [".*", "build", "runs"]

# Docstrings are in Google's style with Sphinx's roles and directives: they are read as they are.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Annotations as they are written: a link to the alias in place of the union that it stands for.
autodoc_type_aliases = {name.rpartition(".")[2]: name for name in reference.data()} | {
    "coll.AxisName": "ef_optax.extend.AxisName",
    "optax.ScalarOrSchedule": "optax.ScalarOrSchedule",
}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
nitpicky = True
# Types of other packages, whose inventories would have to be fetched.
nitpick_ignore_regex = [
    ("py:.*", r"((jax|jnp|np|numpy|optax|typing|collections|os)\..*|Array|DTypeLike)")
]

highlight_language = "none"
nb_execution_mode = "off"  # the committed outputs are shown; a test executes the notebooks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ef_optax {release}"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "github-dark"

# One file with glyphs as paths, in place of a script and fonts from a content delivery network.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
html_static_path.append(str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"))
mathjax_path = "tex-svg.js"

CONTENTS = {
    "Guide": [
        "docs/index",
        "docs/how-to-choose",
        "docs/where-things-go",
        "docs/frameworks",
        "docs/launch",
        "docs/wire",
        "docs/scaling",
        "docs/slow-network",
        "docs/too-strong",
        "docs/language-models",
        "docs/activations",
        "docs/kernels",
        "docs/write-your-own",
        "docs/glossary",
        "docs/stability",
    ],
    "Notebooks": sorted(f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")),
    "Tables": ["docs/compressors", "docs/definitions", "docs/equivalences", "docs/features"],
    "Reference": ["docs/reference/index"],
    "Project": ["CONTRIBUTING", "CHANGELOG", "experiments/README", "benchmarks/README"],
}
"""The pages by section, as they stand in the bar at the side."""


def add_contents(app: Sphinx, docname: str, content: list[str]) -> None:
    """Gives the README, the home page, tables of contents, which GitHub has no use for."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            entries = "\n".join(f"/{page}" for page in pages)
            content[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def sentences(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sentences where Napoleon expects a type before a colon, or one error a line."""
    text = (": " if what in ("attribute", "property") else "") + "\n".join(lines)
    text = re.sub(r"^(Returns:\n +)(?=\S)", r"\1: ", text, flags=re.MULTILINE)
    text = re.sub(r"^( +.*\.)\s+(?=\w+Error: )", r"\1\n  ", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def plain_aliases(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Sphinx writes an alias that is part of a union (``Rate | None``) as the call that made it."""
    alias = re.compile(r"TypeAliasForwardRef\('([^']*)'\)")
    if not alias.search(f"{signature}{returns}"):
        return None
    return alias.sub(r"\1", signature or ""), alias.sub(r"\1", returns or "")


def by_last_part(app: Sphinx, env: Any, node: pending_xref, contnode: nodes.Node) -> Any:
    """Finds a name wherever it is public, if once; what is private but exists stays plain code."""
    if node.get("refdomain") != "py":
        return None
    domain, last = env.domains.python_domain, node["reftarget"].rpartition(".")[2]
    kinds = domain.objtypes_for_role(node["reftype"])
    found = [
        entry
        for name, entry in domain.objects.items()
        if name.rpartition(".")[2] == last and entry.objtype in kinds and not entry.aliased
    ]
    if len(found) != 1:
        return contnode if last in reference.defined() else None
    (entry,) = found
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", contnode, internal=True, refuri=f"{uri}#{entry.node_id}")


def complete(app: Sphinx, env: Any) -> None:
    """Warns of public names that are on no page."""
    for name in reference.public():
        if name not in env.domains.python_domain.objects:
            logger.warning("%s is public and is on no page of the reference", name)


class LinkedCode(SphinxTransform):
    """Code in the text that is a public name, or a call of one, links to its reference."""

    default_priority = 900

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            match = re.match(r"(?:ef|ef_optax)\.([\w.]+)(?=$|\()", text)
            inside = isinstance(literal.parent, (nodes.reference, pending_xref))
            if inside or not match or f"ef_optax.{match[1]}" not in reference.public():
                continue
            reference_node = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"ef_optax.{match[1]}",
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(reference_node)
            reference_node += literal


class LocalImages(SphinxTransform):
    """Pictures that lie elsewhere, as the badges of the notebooks do, are shown by their text."""

    default_priority = 5  # before Sphinx collects the images

    def apply(self, **kwargs: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            if "://" in image["uri"]:
                image.replace_self(nodes.Text(image.get("alt", image["uri"])))


def front_page(app: Sphinx, error: Exception | None) -> None:
    """The site opens at index.html."""
    if error is None:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: reference.write())
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", sentences, priority=100)
    app.connect("autodoc-process-signature", plain_aliases)
    app.connect("missing-reference", by_last_part)
    app.connect("env-check-consistency", complete)
    app.connect("build-finished", front_page)
    app.add_transform(LinkedCode)
    app.add_transform(LocalImages)
