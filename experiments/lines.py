"""Files of results that grow by a line of JSON for each, and outlive a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class OutputError(Exception):
    """What is on the disk cannot be used as asked."""


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file, without a last line that a kill cut short; none if it is new.

    Raises:
      OutputError: a line is no JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:  # not JSON, or not even text
        raise OutputError(f"{path}: damaged line ({error})") from None


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line and waits until it is on the disk; what a kill left of another line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.truncate(_complete(file))
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _complete(file: Any) -> int:
    """The bytes of a file up to the end of its last complete line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if not size or file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
