"""The common code of the small studies: flags, output folder, descent by scan, table, picture.

A study is one script that computes in a minute on a CPU, in float64, and writes

```
OUT_DIR/config.json    flags and versions        OUT_DIR/table.md     the numbers to quote
        metrics.jsonl  one line per measurement          curves.png   the picture
```
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from experiments import data, storage
from experiments.arguments import UsageError

# Okabe and Ito's colours, which stay distinct for every common kind of colour blindness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

########################################################################################
# The frame of a script
########################################################################################


def command(
    values: flags.FlagValues, description: str, argv: Sequence[str], job: Callable[[], None]
) -> None:
    """Parses the flags and runs; what the user can fix becomes one line and a failing exit.

    Args:
      values: the flags of the program, to be parsed.
      description: shown by ``--help``, above the flags.
      argv: the name of the program and its arguments.
      job: the program.
    """
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(description + "\nFlags:\n" + values.get_help())
        return
    values.unparse_flags()
    try:
        surplus = values(list(argv))[1:]
        if surplus:
            raise UsageError(f"unexpected argument {surplus[0]!r}; every option starts with --")
        job()
    except (flags.Error, UsageError, storage.OutputError, data.DataError, OSError) as error:
        sys.exit(f"error: {error}")


class Study:
    """A script's flags and output folder.

    The flags belong to the study and not to the process, so one process can run several studies.
    """

    def __init__(self, name: str, description: str | None) -> None:
        self.name, self.description = name, description or ""
        self.flags = flags.FlagValues()
        self._command, self._start = "", 0.0
        given = {"flag_values": self.flags}
        flags.DEFINE_string("out_dir", f"runs/{name}", "Where the results go.", **given)
        flags.DEFINE_bool("overwrite", False, "Replace what --out_dir holds.", **given)

    def main(self, run: Callable[[], None], argv: Sequence[str]) -> None:
        """Parses the flags and runs; what the user can fix becomes one line and a failing exit."""
        self._command = shlex.join(["python", "-m", f"experiments.{self.name}", *argv[1:]])
        self._start = time.perf_counter()

        def job() -> None:
            # A step handles hundreds of scalars: an accelerator would mostly launch kernels.
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                run()

        command(self.flags, self.description, argv, job)

    def open(self) -> Path:
        """The output folder, empty of results and with config.json in it."""
        folder = storage.folder(self.flags.out_dir)
        names = set(self.flags) - {"out_dir", "overwrite"}
        config = {
            "flags": {name: self.flags[name].value for name in sorted(names)},
            "versions": {name: version(name) for name in ("jax", "optax")}
            | {"ef_optax": ef.__version__},
            "about": {"command": self._command, "hardware": f"{os.cpu_count()} CPU cores"},
        }
        storage.check_free(folder, config, resume=False, overwrite=self.flags.overwrite)
        storage.start(folder, config, self.flags.overwrite)
        return folder

    def close(self, folder: Path, rows: list[dict[str, Any]], text: str, figure: Any) -> None:
        """Writes the measurements, the table and the picture, and shows the table."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_text(folder / "metrics.jsonl", lines)
        save(figure, folder / "curves.png")
        seconds = time.perf_counter() - self._start
        note = f"\n- Made by `{self._command}` in {seconds:.0f} s on {os.cpu_count()} CPU cores.\n"
        storage.write_text(folder / "table.md", text + note)
        print(text + note + f"\nWritten: {folder / 'table.md'}, {folder / 'curves.png'}")


########################################################################################
# Computing
########################################################################################


def descend(
    tx: optax.GradientTransformation,
    gradient: Callable[[Any, jax.Array], Any],
    start: Any,
    steps: int,
    key: jax.Array,
    watch: Callable[[Any, Any], Any],
    project: Callable[[Any], Any] = lambda x: x,
    every: int = 1,
) -> Any:
    """What `watch(x, state)` sees before the first step and after every `every` of `steps` steps.

    One step is `x <- project(x + tx(gradient(x, key_t)))`; `jax.vmap` over keys makes it many runs.
    """
    state = tx.init(start)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        x, state = carry
        updates, state = tx.update(gradient(x, key), state, x)
        return (project(optax.apply_updates(x, updates)), state), None

    def stretch(carry: Any, keys: jax.Array) -> tuple[Any, Any]:
        # A single step does not need a loop.
        carry, _ = step(carry, keys[0]) if every == 1 else jax.lax.scan(step, carry, keys)
        return carry, watch(*carry)

    keys = jax.random.split(key, (steps // every, every))
    _, seen = jax.lax.scan(stretch, (start, state), keys)
    first = watch(start, state)
    return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), first, seen)


def first_below(seen: np.ndarray, tolerance: float) -> int | None:
    """The first index at which `seen` is at most `tolerance`, if there is one."""
    reached = np.flatnonzero(seen <= tolerance)
    return int(reached[0]) if len(reached) else None


########################################################################################
# Reporting
########################################################################################


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def panels(rows: int, columns: int, size: tuple[float, float], sharey: bool = False) -> Any:
    """A figure and its (rows, columns) axes with a light grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharey=sharey, layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(True, color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes the whole picture or nothing."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(path)
