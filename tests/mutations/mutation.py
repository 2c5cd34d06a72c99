"""A mutation, how it is applied, and what the tests say to it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LIMIT = 300
"""Seconds of processor time for the tests of one mutation; a fault may make a loop endless."""

PATIENCE = 10 * LIMIT
"""Seconds after which a run that waits for something has no result."""

LIMITED = 'ulimit -t "$0"; exec "$@"'

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

    def tests(
        self, selection: Sequence[str], limit: int | str = "unlimited"
    ) -> subprocess.CompletedProcess[str]:
        """Runs the tests, slow ones as well, up to the first that fails.

        Args:
          selection: files or test ids.
          limit: seconds of processor time; then patience is limited too.
        """
        options = ("-x", "-q", "-n", "0", "-m", "", "--hypothesis-profile=mutations")
        return subprocess.run(
            ["sh", "-c", LIMITED, str(limit), sys.executable, "-m", "pytest", *options, *selection],
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=PATIENCE if isinstance(limit, int) else None,
            check=False,
        )

    def run(self, mutation: Mutation) -> Result:
        """Applies the mutation, runs its tests and takes it back."""
        path, start = self.root / mutation.file, time.perf_counter()
        text = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutation.applied(text), encoding="utf-8")
            word, detail = _judged(self.tests(mutation.tests, LIMIT))
        except ValueError as error:
            word, detail = "BROKEN", str(error)
        except subprocess.TimeoutExpired:
            word, detail = "BROKEN", f"no result after {PATIENCE} s; the machine may be busy"
        finally:
            path.write_text(text, encoding="utf-8")
        return Result(word, detail, time.perf_counter() - start)


def _judged(run: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    if run.returncode == 0:
        return "MISSED", "all tests passed"
    if run.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "caught", f"the tests do not end within {LIMIT} s of processor time"
    failed = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    if run.returncode == 1 and failed:
        return "caught", f"by {failed.group(1)}"
    # The library cannot be imported, or a test is not there: neither shows anything.
    return "BROKEN", (run.stdout + run.stderr)[-1500:]
