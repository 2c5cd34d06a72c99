"""What a comparison leaves on disk, and why it survives a kill at any moment.

```
OUT_DIR/config.json           the flags that decide the numbers, and the versions used
        metrics.jsonl         one line per method, seed and epoch, appended and synced
        wire.json             bytes per step of each compiled program
        checkpoints/METHOD_seedS/EPOCH/    ef.save: parameters, BatchNorm averages, optimizer state
        tensorboard/METHOD_seedS/          event files
        table.md, curves.png  written last, from the files above; report.html with --report
```

An epoch's line reaches the disk before its checkpoint, and a checkpoint appears under its name
only when it is complete. So after a kill the newest checkpoint of a run has all its lines; later
lines are dropped, and the repeated epochs write them again. Everything random is derived
from (seed, epoch), so the repeated epochs give the same numbers to the last bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import ef_optax as ef
from experiments import lines, processes
from experiments.lines import OutputError

_OURS = (
    "config.json",
    "metrics.jsonl",
    "wire.json",
    "table.md",
    "curves.png",
    "report.html",
    "tuning.md",
    "checkpoints",
    "tensorboard",
)


_OVERHEAD = 1 << 17
"""Bytes of a checkpoint beside its arrays."""


def folder(text: str) -> Path:
    """The folder that ``--out_dir`` names; ``~`` is the home directory.

    Raises:
      OutputError: it cannot be a folder of this machine.
    """
    if not text:
        raise OutputError("--out_dir is empty; name a folder, such as runs/demo")
    if "\0" in text:
        raise OutputError(f"--out_dir={text!r} holds a NUL character, which no path may")
    if "://" in text:
        raise OutputError(
            f"--out_dir={text}: results are written to a folder of this machine; mount the store, "
            "or copy the folder there afterwards"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name without such a user
        raise OutputError(f"--out_dir={text}: {error}") from None


def check_free(out_dir: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Refuses a folder that holds results, unless they are to be continued or replaced.

    Raises:
      OutputError: results exist and neither flag was given, or they were made with other flags.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise OutputError(f"--out_dir={out_dir} is a file, not a folder")
    present = [name for name in _OURS if (out_dir / name).exists()]
    if not present or overwrite:
        return
    if not resume:
        raise OutputError(
            f"--out_dir={out_dir} already holds results ({present[0]}): continue them with "
            "--resume, replace them with --overwrite, or choose another folder"
        )
    path = out_dir / "config.json"
    if not path.exists():
        raise OutputError(f"--resume: {path} is missing, so the flags of that run are not known")
    old = read_json(path)
    for name, value in config["flags"].items():
        before = old.get("flags", {}).get(name)
        if before != value:
            raise OutputError(
                f"--resume: {out_dir} was started with --{name}={_spell(before)}, "
                f"not {_spell(value)}; give the same flags or another --out_dir"
            )
    if old.get("versions") != config["versions"]:
        print(f"note: {out_dir} was started with {old.get('versions')}, now {config['versions']}")


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def start(out_dir: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Creates the folder and its configuration; with `overwrite` removes this script's files."""
    if overwrite:
        for name in _OURS:
            path = out_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "config.json").exists():
        write_text(out_dir / "config.json", json.dumps(config, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file written by this module.

    Raises:
      OutputError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path}: not valid JSON ({error})") from None


########################################################################################
# Metrics
########################################################################################


def append_row(out_dir: Path, row: dict[str, Any]) -> None:
    """Adds one line to metrics.jsonl and waits until it is on the disk."""
    lines.append(out_dir / "metrics.jsonl", row)


def read_rows(out_dir: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl, without a last line that a kill cut short."""
    return lines.read(out_dir / "metrics.jsonl")


def forget_unsaved(out_dir: Path, done: dict[tuple[str, int], int]) -> None:
    """Drops what a kill left unfinished; `done` gives the last saved epoch of (method, seed)."""
    rows = read_rows(out_dir)
    kept = [row for row in rows if row["epoch"] <= done.get((row["method"], row["seed"]), 0)]
    write_text(out_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    for run, epoch in done.items():
        folder = run_dir(out_dir, *run)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != str(epoch):
                shutil.rmtree(path, ignore_errors=True)


########################################################################################
# Checkpoints
########################################################################################


def run_dir(out_dir: Path, method: str, seed: int) -> Path:
    """Where the checkpoints of one run are."""
    return out_dir.absolute() / "checkpoints" / run_name(method, seed)


def run_name(method: str, seed: int) -> str:
    """A name for the files of one run; an expression is cut to what every file system takes."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "_", method).strip("_")
    if plain != method:
        plain = f"{plain[:80]}-{zlib.crc32(method.encode()):08x}"
    return f"{plain}_seed{seed}"


def last_epoch(folder: Path) -> int:
    """The newest complete checkpoint's epoch, 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    epochs = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    return next((e for e in epochs if ocp.utils.is_checkpoint_finalized(folder / str(e))), 0)


def save(folder: Path, epoch: int, tx: Any, state: Any) -> None:
    """Saves `state` as the checkpoint of `epoch`, then removes the ones before it.

    Raises:
      OutputError: it cannot be written, as on a full disk; the one before it is kept.
    """
    path = folder / str(epoch)
    advice = "the one before it is kept: go on with --resume once there is room"
    needed = sum(x.nbytes for x in jax.tree.leaves(state) if isinstance(x, jax.Array)) + _OVERHEAD
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:  # Orbax would find out in several threads, each with a traceback
        raise OutputError(
            f"checkpoint {path} needs {needed:,} bytes and {free:,} are free; {advice}"
        )
    try:
        ef.save(
            path,
            tx,
            params=state.params,
            opt_state=state.opt_state,
            extra=state.batch_stats,
            step=epoch,
        )
    except Exception as error:  # every layer below has errors of its own
        if processes.lost(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) < 200 else f"{reason[:100]} ... {reason[-100:]}"
        raise OutputError(f"checkpoint {path} cannot be written ({reason}); {advice}") from None
    if jax.process_index() == 0:
        for path in folder.iterdir():
            if path.name != str(epoch):
                shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path, epoch: int, tx: Any, like: Any) -> Any:
    """The state saved at `epoch`, with the types and shardings of `like`.

    Raises:
      OutputError: the checkpoint is damaged, or belongs to another model or method.
    """
    try:
        found = ef.restore(
            folder / str(epoch),
            tx,
            params=like.params,
            opt_state=like.opt_state,
            extra=like.batch_stats,
        )
    except (ValueError, KeyError, OSError) as error:
        if processes.lost(error):
            raise
        reason = str(error).splitlines()[0]
        raise OutputError(
            f"--resume: {reason} Remove that folder to begin this run again"
        ) from None
    return like._replace(params=found.params, batch_stats=found.extra, opt_state=found.opt_state)
