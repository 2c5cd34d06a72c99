"""Starts a new part of the library: writes its file, its rows in lists, and a failing test.

```
make new KIND=compressor NAME=my_compressor   # or a rule, transport, policy, experiment
```

A kind is a folder of ``tools/templates``: the templates are real code in which the part is still
called ``new_name``, and ``kind.toml`` says where they go and which lists get a row. CONTRIBUTING.md
says what to do next.
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).with_name("templates")


def kinds() -> list[str]:
    return sorted(path.parent.name for path in TEMPLATES.glob("*/kind.toml"))


def insert(text: str, below: str, line: str, sort: bool = False) -> str:
    """Adds a line to the list that follows the line ``below``, at its end or in sorted order.

    The list begins at the next line that starts with the same character as ``line`` (or with any
    letter, if ``line`` does). It ends before the first line that is blank, indented less, or a
    comment. An empty ``below`` means the top of the file.

    Raises:
      ValueError: if there is no such list.
    """
    lines = text.split("\n")
    stripped = [old.strip() for old in lines]
    top = stripped.index(below) + 1 if below in stripped else 0
    rest = range(top, len(lines)) if top or not below else ()
    sign = lambda text: "a" if text[:1].isalpha() else text[:1]  # noqa: E731
    at = next((i for i in rest if sign(stripped[i]) == sign(line)), None)
    if at is None:
        raise ValueError(f"no list of lines like {line!r} below {below!r}")
    indent = lines[at].removesuffix(stripped[at])
    while lines[at].startswith(indent) and stripped[at] and not stripped[at].startswith("#"):
        if sort and stripped[at] > line:
            break
        at += 1
    return "\n".join([*lines[:at], indent + line, *lines[at:]])


def render(kind: str, name: str, room: str = "", root: Path = ROOT) -> list[Path]:
    """Writes the files and rows of a new part below ``root``; returns the files it touched.

    Raises:
      ValueError: for an unknown kind or room, an invalid name, and files that exist.
    """
    if kind not in kinds():
        raise ValueError(f"KIND={kind}: choose one of {', '.join(kinds())}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"NAME={name}: use lower-case letters, digits and underscores")
    plan = tomllib.loads((TEMPLATES / kind / "kind.toml").read_text(encoding="utf-8"))
    rooms: dict[str, dict[str, str]] = plan.get("rooms", {"": {}})
    room = room or next(iter(rooms))
    if room not in rooms:
        raise ValueError(f"ROOM={room}: choose one of {', '.join(rooms)}, or none for a {kind}")

    def filled(text: str) -> str:
        for key, value in {"room": room, **rooms[room]}.items():
            text = text.replace(f"<{key}>", value)
        camel = "".join(part.capitalize() for part in name.split("_"))
        spaced = name.replace("_", " ")
        text = text.replace("new_name", name).replace("NewName", camel)
        return text.replace("new name", spaced).replace("New name", spaced.capitalize())

    files = {filled(path): TEMPLATES / kind / file for file, path in plan["files"].items()}
    if there := [path for path in files if (root / path).exists()]:
        raise ValueError(f"NAME={name}: {', '.join(there)} exists already")
    touched: dict[str, str] = {
        path: filled(template.read_text(encoding="utf-8")) for path, template in files.items()
    }
    for row in plan["rows"]:
        path, below, line = (filled(row[key]) for key in ("path", "below", "line"))
        text = touched.get(path) or (root / path).read_text(encoding="utf-8")
        touched[path] = insert(text, below, line, row.get("sort", False))
    for path, text in touched.items():
        target = root / path
        if not target.parent.exists():  # the first test of a room
            target.parent.mkdir()
            (target.parent / "__init__.py").touch()
        target.write_text(text, encoding="utf-8")
    return [root / path for path in touched]


def tidy(paths: list[Path]) -> None:
    """Sorts imports and formats, as ``make format`` does."""
    python = [str(path) for path in paths if path.suffix == ".py"]
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", "--select=I", "--fix", *python], check=True)
    subprocess.run([*ruff, "format", "--quiet", *python], check=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="make new", description=__doc__)
    for option in ("kind", "name", "room"):
        parser.add_argument(f"--{option}", default="")
    given: Any = parser.parse_args(argv)
    try:
        paths = render(given.kind, given.name, given.room)
    except ValueError as error:
        sys.exit(f"error: {error}")
    tidy(paths)
    for path in paths:
        print(path.relative_to(ROOT))
    print(f"\nWhat to do now: CONTRIBUTING.md. When it is done: make check NAME={given.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
