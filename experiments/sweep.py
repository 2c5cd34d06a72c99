"""The same job for every combination of some values, and one table of all of them.

```
python -m experiments.lm --sweep='peak=1e-3,3e-3,1e-2; ratio=0.01,0.1' \\
    --methods='error_feedback(top_k({ratio})) | adamw(cosine({peak}))'
```

A name is a flag, or stands in braces in the value of other flags. Every combination has a folder of
its own in --out_dir, and sweep.md beside these folders joins them. --resume goes on after an
interruption; a run that diverges is recorded as lost and does not stop the others.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments import report, storage
from experiments.arguments import Diverged, UsageError

_FIXED = ("sweep", "out_dir", "resume", "overwrite", "workers", "fsdp", "tune", "multihost")
"""Flags that decide where a job runs, and which cannot change within one process."""


def run(values: flags.FlagValues, job: Callable[[], None]) -> None:
    """Runs the job once, or for every combination of --sweep.

    Args:
      values: the flags of the job, which reads them when it is called.
      job: writes a folder that `experiments.comparison` made.

    Raises:
      UsageError: for a --sweep that cannot be run.
    """
    if not values.sweep:
        job()
        return
    swept = parse(values.sweep, values)
    if values.multihost or ("tune" in values and values.tune):
        raise UsageError("--sweep runs in one process and without --tune")
    out_dir, words = storage.folder(values.out_dir), sys.argv[1:]
    texts = {name: str(values[name].serialize()) for name in values}
    rows = []
    combinations = [
        dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())
    ]
    for index, chosen in enumerate(combinations):
        print(f"\nsweep {index + 1} of {len(combinations)}: {_shown(chosen)}", flush=True)
        folder = out_dir / re.sub(r"[^A-Za-z0-9.=,_-]+", "_", _shown(chosen).replace(", ", ","))
        own = [f"--{name}={text}" for name, text in chosen.items() if name in values]
        for name, text in texts.items():
            filled = _filled(text, chosen)
            if name != "sweep" and filled != text:
                own.append(filled)
        # Through the command line, which the job records beside its results.
        sys.argv[1:] = [*words, "--sweep=", *own, f"--out_dir={folder}"]
        values.unparse_flags()
        values(sys.argv)
        try:
            job()
            lost = ""
        except Diverged as error:
            print(f"lost: {error}", file=sys.stderr)
            lost = str(error)
        rows += _results(folder, chosen, lost)
    text = table(list(swept), rows)
    storage.write_text(out_dir / "sweep.md", text)
    print("\n" + text + f"\nWritten: {out_dir / 'sweep.md'}")


def parse(text: str, values: flags.FlagValues) -> dict[str, list[str]]:
    """The values of every name, as `name=value,value; name=value,...`.

    Raises:
      UsageError: it is nothing of this kind, or a name that means nothing.
    """
    swept: dict[str, list[str]] = {}
    used = set()
    for name in values:
        if name != "sweep":
            used |= set(re.findall(r"\{(\w+)\}", str(values[name].serialize())))
    for part in _split(text, ";"):
        name, _, listed = part.partition("=")
        name, found = name.strip(), _split(listed, ",")
        if not found or name in swept:
            raise UsageError(f"--sweep: {part!r} is not name=value,value,... with a new name")
        if name in _FIXED:
            raise UsageError(f"--sweep: {name} cannot change within a sweep")
        if name not in used and name not in values:
            near = difflib.get_close_matches(name, [*used, *values], n=3, cutoff=0.5)
            raise UsageError(
                f"--sweep: {name} is no flag and stands nowhere in braces"
                + (f"; is it {' or '.join(near)}?" if near else "")
            )
        swept[name] = found
    if missing := sorted(used - set(swept)):
        raise UsageError(f"--sweep: there are no values for {{{missing[0]}}}")
    return swept


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are not inside of parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == separator and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _filled(text: str, chosen: dict[str, str]) -> str:
    for name, value in chosen.items():
        text = text.replace("{" + name + "}", value)
    return text


def _shown(chosen: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


########################################################################################
# The table
########################################################################################


def _results(folder: Path, chosen: dict[str, str], lost: str) -> list[dict[str, Any]]:
    """One row for each method of a combination: its last values, and whether it was lost."""
    config, rows = storage.read_json(folder / "config.json"), storage.read_rows(folder)
    path = folder / "wire.json"
    wire = storage.read_json(path) if path.exists() else {}
    judged, found = report.quantity(config), report.by_method(rows)
    results = []
    for index, method in enumerate(config["flags"]["methods"]):
        runs = found.get(method, [])
        finals = [judged.scale * run[-1][judged.key] for run in runs]
        complete = len(runs) == config["flags"]["seeds"] and not lost.startswith(f"{method}, seed ")
        results.append(
            {
                "chosen": chosen,
                "index": index,
                "method": method,
                "judged": judged,
                "value": report.mean_std(finals) if complete else None,
                "message": report.average(wire[method])["message_bytes"]
                if method in wire
                else None,
            }
        )
    return results


def table(names: list[str], rows: list[dict[str, Any]]) -> str:
    """All combinations, one line for each method; the best of each method is bold."""
    judged = rows[0]["judged"]
    best = {}
    for row in rows:
        if row["value"]:
            before = best.get(row["index"])
            means = [r["value"][0] for r in (row, before) if r]
            if before is None or judged.best(means) != before["value"][0]:
                best[row["index"]] = row
    lines = [[*names, "method", judged.head, "message (bytes/step)"]]
    lines.append(["---"] * (len(names) + 1) + ["--:"] * 2)
    for row in sorted(rows, key=lambda row: row["index"]):
        cell = "lost"
        if row["value"]:
            mean, deviation = row["value"]
            cell = f"{mean:.{judged.digits}f}" + (
                f" ± {deviation:.{judged.digits}f}" if deviation else ""
            )
            cell = f"**{cell}**" if row is best.get(row["index"]) else cell
        method = f"`{row['method']}`".replace("|", "\\|")
        sent = "" if row["message"] is None else f"{row['message']:,}"
        lines.append([*(row["chosen"][name] for name in names), method, cell, sent])
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"# Sweep over {', '.join(names)}\n\n{text}\nThe best of each method is bold.\n"
