"""The reference pages: one for each file of the library that holds a public name.

``make docs`` writes them into ``docs/reference`` before Sphinx reads them; nothing in them is
written by hand, so a new public name has its page at once. A page shows the docstring of the file
(of a rule: the box of its algorithm), the documentation of its names, what the tables of the other
pages say about them, and the file itself.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import ef_optax as ef

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"

ROOMS = {
    "compressors/sparse": "Sparse messages",
    "compressors/quantize": "Quantised messages",
    "compressors/low_rank": "Messages of low rank",
    "compressors/combine": "Compressors made from other compressors",
    "exchanges": "Exchanges",
    "feedback": "Feedback rules",
    "local": "Local steps",
    "recipes": "Recipes of the literature",
    "activations": "Activations of a pipeline",
    "estimators": "Gradient estimators",
    "policies": "Policies",
    "parallel": "From one worker to many",
    "measure": "Measuring",
    "theory": "Theory",
    "extend": "The author's kit",
}
"""The sections of the reference in the order of reading: the rooms of the library, by title."""

ELSEWHERE = {"checkpoint": "parallel", "flat": "parallel", "expressions": "parallel"}
"""The sections of files that lie in no room."""


@functools.cache
def public() -> dict[str, Any]:
    """Every public name, dotted, with its value.

    Public is what the front door lists, what its modules list, and the functions and classes of the
    modules that those list (``ef.extend.memory``). A value with two names keeps the first.
    """
    found: dict[str, Any] = {}

    def collect(module: ModuleType, prefix: str) -> None:
        names = getattr(module, "__all__", None) or own_names(module)
        values = {name: getattr(module, name) for name in names}
        known = {id(value) for value in found.values()}
        inner = {name: value for name, value in values.items() if inspect.ismodule(value)}
        for name, value in values.items():
            if name not in inner and id(value) not in known:
                found[f"{prefix}.{name}"] = value
        for name, value in inner.items():
            collect(value, f"{prefix}.{name}")

    collect(ef, "ef_optax")
    return found


def own_names(module: ModuleType) -> list[str]:
    """The functions and classes that a module without ``__all__`` defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def room_of(module: str) -> str:
    """The section of a file: its room, or the author's kit for what lies elsewhere."""
    parts = module.split(".")[1:]
    own = ("/".join(parts[:-1]), parts[0], ELSEWHERE.get(parts[0]))
    return next((room for room in own if room in ROOMS), "extend")


@functools.cache
def by_file() -> dict[str, list[str]]:
    """The public names that each module defines, in the order of its source."""
    homes: dict[str, list[str]] = {}
    for name, value in public().items():
        if name not in data():
            homes.setdefault(value.__module__, []).append(name)
    for names in homes.values():  # functions first, then classes, each in the order of the file
        names.sort(key=lambda name: (is_class(name), inspect.getsourcelines(public()[name])[1]))
    return homes


@functools.cache
def data() -> list[str]:
    """The public names that are neither functions nor classes of the library: types and values."""
    return [
        name
        for name, value in public().items()
        if not (inspect.isfunction(value) or inspect.isclass(value))
        or not value.__module__.startswith("ef_optax.")
    ]


@functools.cache
def defined() -> frozenset[str]:
    """Every function and class of the library by its last name, private ones too."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("ef_optax/**/*.py"))
    return frozenset(re.findall(r"^ *(?:def|class) (\w+)", text, re.MULTILINE))


def is_class(name: str) -> bool:
    return inspect.isclass(public()[name])


def is_tuple(name: str) -> bool:
    """Whether a name is a named tuple, as the states are."""
    return getattr(public()[name], "__bases__", ()) == (tuple,)


# ------------------------------------------------------------------- what other pages say


@functools.cache
def table_rows(page: str) -> list[list[str]]:
    """The cells of every row of the tables of a page in ``docs``, heads and rules included."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def mentions(cell: str, names: Iterable[str]) -> bool:
    """Whether code in a cell is one of these names or a call of one."""
    calls = re.findall(r"`(?:ef\.)?([\w.]+)", cell)
    return any(name in calls for name in names)


def numbers(names: list[str]) -> list[list[str]]:
    return [row for row in table_rows("compressors.md") if mentions(row[0], names)]


def definitions(names: list[str]) -> list[str]:
    """The lines of the definitions, each cell a paragraph under the head of its column."""
    found, head = [], []
    for row in table_rows("definitions.md"):
        if row[0] == "name":
            head = row
        elif mentions(row[0], names):
            cells = zip(head[1:], row[1:], strict=True)
            found += [
                row[0].replace("\\|", "|"),
                *[f"- **{column}**: {cell}" for column, cell in cells if cell],
            ]
    return found


@functools.cache
def algorithms() -> dict[str, str]:
    """The public name that builds each algorithm of the graph of equivalences."""
    rows = [row for row in table_rows("equivalences.md") if len(row) == 2 and "`ef." in row[1]]
    names = {}
    for written, built_by in rows:
        for algorithm in written.split(", "):
            names[algorithm.strip("`")] = f"ef_optax.{built_by.strip('`').removeprefix('ef.')}"
    return names


def equivalences(names: list[str]) -> list[str]:
    """The edges of the graph that touch one of these names, their algorithms linked."""
    longest_first = sorted(algorithms(), key=len, reverse=True)
    algorithm = re.compile(rf"(?<![\w+-])({'|'.join(map(re.escape, longest_first))})(?![\w+-])")
    edges = []
    for edge, held_by in table_rows("equivalences.md"):
        if "::" not in held_by:
            continue
        built_by = {algorithms()[found] for found in algorithm.findall(edge)}
        if built_by & set(names):
            edges.append(algorithm.sub(lambda m: link(m[1], algorithms()[m[1]]), edge))
    return edges


def link(text: str, name: str) -> str:
    return f"{{py:obj}}`{text} <{name}>`"


# ---------------------------------------------------------------------------- the pages


def fenced(kind: str, text: str, *options: str) -> str:
    return "\n".join([f"```{kind}", *options, text, "```"])


def rst(text: str, module: str = "ef_optax") -> str:
    """Text in the markup of the docstrings."""
    return fenced("{eval-rst}", f".. currentmodule:: {module}\n\n{text}")


def markdown(paragraph: str) -> str:
    """A paragraph of a docstring in Markdown: code has single quotes, roles are code."""
    return re.sub(r":\w+:`~?([^`<]+?)`", r"`\1`", paragraph.replace("``", "`"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def documentation(name: str) -> str:
    """What documents a name from its docstring; of a state also its fields, with their comments."""
    kind = "autoclass" if is_class(name) else "autofunction"
    module, own = home_of(name)
    lines = [f".. currentmodule:: {module}", f".. {kind}:: {module}::{own}"]
    if is_class(name) and not is_tuple(name):
        lines.append("   :members:")
    text = fenced("{eval-rst}", "\n".join(lines))
    return text + "\n\n" + fenced("python", fields(public()[name])) if is_tuple(name) else text


def home_of(name: str) -> tuple[str, str]:
    """The module that exports a name, and its path in it: ``ef_optax.extend``, ``memory.zeros``."""
    parts = name.split(".")
    at = 2 if parts[1] in ef.__all__ and len(parts) > 2 else 1
    return ".".join(parts[:at]), ".".join(parts[at:])


def fields(state: type) -> str:
    """The lines of a named tuple that declare its fields."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(state)))
    body = [node for node in tree.body[0].body if isinstance(node, ast.AnnAssign)]
    lines = inspect.getsource(state).splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return textwrap.dedent("\n".join(lines))


def source(module: str) -> str:
    path = Path(inspect.getsourcefile(importlib.import_module(module))).relative_to(ROOT)
    code = fenced(f"{{literalinclude}} /{path}", "", ":language: python")
    summary = f"<summary>Source: <code>{path}</code></summary>"
    return f"<details class='source'>{summary}\n\n{code}\n\n</details>"


def page(module: str, names: list[str]) -> str:
    """The page of one file."""
    own = [name.rpartition(".")[2] for name in names]
    functions = [name.rpartition(".")[2] for name in names if not is_class(name)]
    title = functions or own
    if len(title) > 3 or "." in home_of(names[0])[1]:  # one of the kit's modules
        title = [module.rpartition(".")[2]]
    parts = [f"# {', '.join(title)}"]
    parts += introduction(module)
    parts += [documentation(name) for name in names]
    if found := numbers(own):
        head = ["compressor", "bits", "factor", "alpha", "omega", "basis", "properties"]
        parts += ["## In numbers", NUMBERS, table(head, found)]
    if found := definitions(own):
        parts += ["## Definition, to the bit", DEFINITION, *found]
    if room_of(module) in RULES or equivalences(names):
        edges = "\n".join(f"- {edge}" for edge in equivalences(names))
        parts += ["## In the graph of equivalences", edges or NO_EDGE]
    parts.append(source(module))
    return "\n\n".join(parts) + "\n"


def introduction(module: str) -> list[str]:
    """The docstring of a file; the box of an algorithm stays as it is set."""
    text = inspect.getdoc(importlib.import_module(module))
    summary, _, rest = text.partition("\n\n")
    boxed = room_of(module) in BOXES
    if not rest:
        return [markdown(summary)]
    if boxed and not re.search(r"(^|\n\n)    ", rest):
        return [markdown(summary), fenced("text", rest)]
    if not boxed:
        return [rst(text)]
    parts = [markdown(summary)]
    for paragraph in rest.split("\n\n"):
        indented = paragraph.startswith("    ")
        parts.append(fenced("text", textwrap.dedent(paragraph)) if indented else rst(paragraph))
    return parts


RULES = ("feedback", "local", "recipes")
BOXES = (*RULES, "exchanges", "estimators", "policies", "activations")
NUMBERS = (
    "For a leaf of 64 x 64 float32 values and 8 workers; "
    "[what the columns mean](/docs/compressors.md)."
)
DEFINITION = (
    "The letters and what holds for all are on the page of [definitions](/docs/definitions.md)."
)
NO_EDGE = "No edge of the [graph](/docs/equivalences.md) leads here."


def pages() -> dict[str, str]:
    """Every page of the reference by its path under ``docs/reference``."""
    made: dict[str, str] = {}
    rooms: dict[str, list[str]] = {room: [] for room in ROOMS}
    for module, names in sorted(by_file().items()):
        room = room_of(module)
        own = module.rpartition(".")[2]
        made[f"{folder(room)}/{own}.md"] = page(module, names)
        rooms[room].append(module)
    rooms = {room: modules for room, modules in rooms.items() if modules}
    for room, modules in rooms.items():
        made[f"{folder(room)}/index.md"] = room_page(room, modules)
    entries = "\n".join(f"{folder(room)}/index" for room in rooms)
    begin = [
        [link(f"ef.{name}", f"ef_optax.{name}"), first_sentence(f"ef_optax.{name}")]
        for name in to_begin_with()
    ]
    made["index.md"] = (
        "\n\n".join(
            (
                "# Reference",
                "Ten names are enough to begin:",
                table(["name", "what it is"], begin),
                "All public names, by what they are:",
                fenced("{toctree}", entries, ":maxdepth: 1", ""),
            )
        )
        + "\n"
    )
    return made


def to_begin_with() -> list[str]:
    """The names in the table at the top of ``help(ef_optax)``."""
    return re.findall(r"``(\w+)``", inspect.getdoc(ef).split("=====\n")[1])


def folder(room: str) -> str:
    return room.replace("/", "_")


def room_page(room: str, modules: list[str]) -> str:
    """The page of a section: what it holds, in a line each."""
    package = f"ef_optax.{room.replace('/', '.')}"
    introduction = inspect.getdoc(importlib.import_module(package))
    directive = "module" if room in ef.__all__ else "currentmodule"
    names = [name for module in modules for name in by_file()[module] if not is_tuple(name)]
    rows = [[link(name.replace("ef_optax", "ef", 1), name), first_sentence(name)] for name in names]
    entries = "\n".join(module.rpartition(".")[2] for module in modules)
    parts = [
        f"# {ROOMS[room]}",
        fenced("{eval-rst}", f".. py:{directive}:: {package}\n\n{introduction}"),
        table(["name", "what it is"], rows),
        fenced("{toctree}", entries, ":hidden:", ""),
    ]
    if room == "extend":
        parts += ["## Types and values", rst("\n".join(map(data_entry, data())), "None")]
    return "\n\n".join(parts) + "\n"


def data_entry(name: str) -> str:
    """The directive of a type, with what it stands for, or of a value, with its class."""
    value = public()[name]
    of_library = type(value).__module__.startswith("ef_optax.")
    what = f":type: {type(value).__name__}" if of_library else f":value: {value}"
    return f".. py:data:: {name}\n   {what}"


def first_sentence(name: str) -> str:
    """The first paragraph of a docstring, in Markdown's markup for code and for a table."""
    paragraph = inspect.getdoc(public()[name]).partition("\n\n")[0]
    return markdown(paragraph).replace("\n", " ").replace("|", "\\|")


def write() -> None:
    """Writes the pages; what is already there and the same is left, so that Sphinx skips it."""
    made = pages()
    for path in PAGES.rglob("*.md"):
        if str(path.relative_to(PAGES)) not in made:
            path.unlink()
    for name, text in made.items():
        path = PAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
