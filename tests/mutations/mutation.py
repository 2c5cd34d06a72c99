"""A mutation, how it is applied, and what the tests say to it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LIMIT = 300
"""Seconds that the tests of one mutation may take; a fault may make a loop endless."""

LEFT_OUT = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "runs", "build", "site")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
      fault: what the changed library does wrong, in a few words.
      file: path from the root of the repository.
      old: text that stands exactly once in the file.
      new: what stands there instead.
      tests: files or test ids of pytest, of which at least one must fail.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The text of the file with the fault in it.

        Raises:
          ValueError: if the old text does not stand there exactly once.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(
                f"{self.file}: the old text of the mutation {self.fault!r} stands there {count} "
                f"times; it must stand there once:\n{self.old}"
            )
        return text.replace(self.old, self.new)


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one mutation."""

    word: str  # "caught", "MISSED" or "BROKEN"
    detail: str  # the first test that failed, or what went wrong
    seconds: float


class Copy:
    """A copy of the tree, in which one mutation at a time is applied."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)

    def tests(self, selection: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Runs the tests up to the first that fails."""
        options = ("-x", "-q", "-n", "0", "--hypothesis-profile=mutations")
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-m", "", *selection],  # slow ones as well
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def run(self, mutation: Mutation) -> Result:
        """Applies the mutation, runs its tests and takes it back."""
        path, start = self.root / mutation.file, time.perf_counter()
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutation.applied(text), encoding="utf-8")
            word, detail = _judged(self.tests(mutation.tests))
        except ValueError as error:
            word, detail = "BROKEN", str(error)
        except subprocess.TimeoutExpired:
            word, detail = "caught", f"the tests do not end within {LIMIT} s"
        finally:
            path.write_text(text, encoding="utf-8")
        return Result(word, detail, time.perf_counter() - start)


def _judged(run: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    if run.returncode == 0:
        return "MISSED", "all tests passed"
    failed = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    if run.returncode == 1 and failed:
        return "caught", f"by {failed.group(1)}"
    # The library cannot be imported, or a test is not there: neither shows anything.
    return "BROKEN", (run.stdout + run.stderr)[-1500:]
