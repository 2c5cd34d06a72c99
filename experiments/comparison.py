"""The runs of a comparison: method by method, seed by seed, epoch by epoch.

What `experiments.train` and `experiments.lm` have in common: the flags of an output folder, one
epoch, resuming, stopping, logging and the report at the end.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags, logging
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter
from tqdm import tqdm

import ef_optax as ef
from ef_optax import report as ef_report
from experiments import data, processes, programs, storage
from experiments.arguments import Diverged, UsageError
from experiments.programs import Programs, State, Training
from experiments.workers import Workers


def define_flags(values: flags.FlagValues, out_dir: str, seeds: int) -> None:
    """The flags that decide how a comparison is run, and not what it computes."""
    given: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_list("lr", [], "Learning rates as method=rate,...", **given)
    flags.DEFINE_integer(
        "seeds", seeds, "Runs per method; seed s decides start and order of the data.", **given
    )
    flags.DEFINE_string("out_dir", out_dir, "Where the results go.", **given)
    flags.DEFINE_string(
        "sweep",
        "",
        "Run all combinations of these values and write one table, as 'peak=1e-3,3e-3; "
        "ratio=0.01,0.1'. A name is a flag, or stands in braces in other flags: top_k({ratio}).",
        **given,
    )
    flags.DEFINE_bool("resume", False, "Continue what --out_dir holds, bit-exactly.", **given)
    flags.DEFINE_bool(
        "overwrite", False, "Replace what --out_dir holds, even with --resume.", **given
    )
    flags.DEFINE_integer(
        "checkpoint_every", 1, "Epochs between checkpoints.", lower_bound=1, **given
    )
    flags.DEFINE_integer(
        "check_replicas",
        0,
        "Epochs between two looks whether all workers' parameters are the same; 0: never.",
        lower_bound=0,
        **given,
    )
    flags.DEFINE_bool(
        "monitor",
        False,
        "Record what the exchanges send and drop, by layer, once an epoch.",
        **given,
    )
    flags.DEFINE_bool(
        "report", False, "Monitor, and write report.html with advice and its reasons.", **given
    )
    flags.DEFINE_float(
        "bandwidth",
        None,
        "Of a worker's link, in bits per second: the report has seconds too.",
        **given,
    )


def check_flags(values: flags.FlagValues) -> None:
    """Refuses what no comparison can do.

    Raises:
      UsageError: with the flag.
    """
    if values.seeds < 1:
        raise UsageError(f"--seeds={values.seeds}: at least one run per method is needed")
    if values.bandwidth is not None and not values.bandwidth > 0:
        raise UsageError(f"--bandwidth={values.bandwidth} must be positive")
    if values.report:
        ef_report.require()


class Task(NamedTuple):
    """What is compared, and how an epoch is judged.

    Attributes:
      training: the model and the data.
      optimizer: the transformation of one worker for a method.
      compressor: what the method would send, for runs of one worker.
      evaluate: (params, batch_stats) -> what a line of metrics.jsonl says of held-out data.
      rate: (rate of the method, epoch from 0) -> the rate of this epoch.
      shown: a line of metrics.jsonl -> a few words for the progress bar and the end of a run.
      logged: what TensorBoard gets of a line.
      epochs: in a run.
      unit: what an epoch is called in messages.
      monitored: whether the exchanges are recorded.
      period: steps between two exchanges of a method.
    """

    training: Training
    optimizer: Callable[[str], optax.GradientTransformation]
    compressor: Callable[[str], ef.Compressor]
    evaluate: Callable[[Any, Any], dict[str, float]]
    rate: Callable[[float, int], float]
    shown: Callable[[dict[str, Any]], str]
    logged: Sequence[str]
    epochs: int
    unit: str = "epoch"
    monitored: bool = False
    period: Callable[[str], int] = lambda method: 1

    def build(self, method: str, workers: Workers) -> Programs:
        """The compiled programs of a method."""
        chain = self.optimizer(method)
        chain = ef.monitor(chain) if self.monitored else chain
        made = programs.build(chain, self.compressor(method), self.training, workers)
        period = self.period(method)
        return made._replace(wire=made.wire | {"period": period}) if period > 1 else made


class Epochs:
    """Trains one epoch after the other, with a progress bar over all of them."""

    def __init__(self, task: Task, workers: Workers, total: int) -> None:
        self.task, self.workers = task, workers
        self.bar = tqdm(
            total=total * task.training.blocks,
            unit="block" if task.training.blocks > 1 else task.unit,
            disable=not (is_writer() and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

        @functools.partial(jax.jit, out_shardings=workers.replicated)
        def over_workers(losses: jax.Array) -> jax.Array:
            """(steps, workers) -> (steps,): not in the training program, whose bytes we count."""
            return losses.mean(1)

        self.over_workers = over_workers

    def train(
        self, compiled: Programs, state: State, rate: float, seed: int, epoch: int
    ) -> tuple[State, dict[str, Any]]:
        """Trains the epoch with this 0-based number; returns the new state and what to log."""
        start = time.perf_counter()
        rate = self.task.rate(rate, epoch)
        parts = []
        for batches in self.task.training.batches(seed, epoch):
            state, losses = compiled.run_block(state, np.float32(rate), batches)
            parts.append(np.asarray(self.over_workers(losses)))
            self.bar.update()
        means = np.concatenate(parts)
        finite = np.isfinite(means)
        row = {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": float(means[finite].mean()) if finite.any() else math.nan,
            **self.task.evaluate(state.params, state.batch_stats),
            "skipped_steps": int(np.sum(~finite)),
            "lost": not finite[-100:].any(),
            "seconds": round(time.perf_counter() - start, 3),
        }
        if self.task.monitored:
            row["monitor"] = ef.measure.summary(state.opt_state, by="leaf")
        return state, row


def is_writer() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def versions(devices: list[Any]) -> dict[str, str]:
    """What the numbers may depend on."""
    names = ("jax", "optax", "flax")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"ef_optax": ef.__version__, "device": devices[0].device_kind}


def prepare(values: flags.FlagValues, out_dir: Path, config: dict[str, Any], resume: bool) -> None:
    """Makes the output folder; nothing is touched until everything has been checked."""
    processes.agree({name: config[name] for name in ("flags", "versions", "data")})
    storage.check_free(out_dir, config, resume, values.overwrite)
    if values.multihost:
        multihost_utils.sync_global_devices("the output folder was checked by all")
    if is_writer():
        storage.start(out_dir, config, values.overwrite)
    if values.multihost:  # the others must not see checkpoints that --overwrite removes
        multihost_utils.sync_global_devices("the output folder is ready")


def compare(
    values: flags.FlagValues,
    task: Task,
    workers: Workers,
    out_dir: Path,
    rates: dict[str, float],
) -> None:
    """Trains every method with every seed, from where `out_dir` says that they are.

    Args:
      values: the flags of `define_flags`.
      task: what is compared.
      workers: where.
      out_dir: the folder that `prepare` made.
      rates: the methods, and the rate of each.
    """
    writer, blocks = is_writer(), task.training.blocks
    stop = processes.Stop()
    seeds = range(values.seeds)
    folders = {(m, s): storage.run_dir(out_dir, m, s) for m in rates for s in seeds}
    done = {run: storage.last_epoch(folder) for run, folder in folders.items()}
    saved = {f"checkpoint {storage.run_name(*run)} at epoch": epoch for run, epoch in done.items()}
    processes.agree({"folders": saved})
    if writer:
        storage.forget_unsaved(out_dir, done)
    wire_path = out_dir / "wire.json"
    wire = storage.read_json(wire_path) if writer and wire_path.exists() else {}
    epochs = Epochs(task, workers, len(folders) * task.epochs)
    bar = epochs.bar
    bar.initial = bar.n = blocks * sum(done.values())
    if writer and any(done.values()):
        print(
            f"resumed: {sum(done.values())} of {bar.total // blocks} {task.unit}s were done before"
        )

    for method in rates:
        if all(done[method, seed] == task.epochs for seed in seeds):
            continue
        compiled = task.build(method, workers)
        if writer:
            wire[method] = compiled.wire
            storage.write_text(wire_path, json.dumps(wire, indent=2) + "\n")
        for seed in seeds:
            first = done[method, seed]
            if first == task.epochs:
                continue
            state = compiled.create(seed)
            if first:
                state = storage.restore(folders[method, seed], first, compiled.tx, state)
            events = out_dir / "tensorboard" / storage.run_name(method, seed)
            board = SummaryWriter(str(events), purge_step=first + 1) if writer else None
            for epoch in range(first, task.epochs):
                state, row = epochs.train(compiled, state, rates[method], seed, epoch)
                if values.check_replicas and (epoch + 1) % values.check_replicas == 0:
                    processes.check_replicas(
                        state.params, f"{method}, seed {seed}: {task.unit} {epoch + 1}"
                    )
                if row.pop("lost"):
                    raise Diverged(
                        f"{method}, seed {seed}: the loss is not finite at the end of {task.unit} "
                        f"{epoch + 1} and all workers skip every step; --lr={method}="
                        f"{rates[method]:g} is probably too large. Finished {task.unit}s are kept "
                        f"in {out_dir}"
                    )
                bar.set_postfix_str(f"{method} seed {seed}: {task.shown(row)}")
                stopping = stop.agreed()
                if board:
                    storage.append_row(out_dir, {"method": method, "seed": seed, **row})
                    for name in task.logged:
                        board.add_scalar(name, row[name], epoch + 1)
                    for name, value in row.get("monitor", {}).items():
                        board.add_scalar(f"monitor/{name}", value, epoch + 1)
                last = epoch + 1 == task.epochs
                if last or stopping or (epoch + 1) % values.checkpoint_every == 0:
                    storage.save(folders[method, seed], epoch + 1, compiled.tx, state)
                if stopping:
                    raise KeyboardInterrupt
                if last and writer and bar.disable:
                    print(f"{method} seed {seed}: {task.shown(row)}", flush=True)
            if board:
                board.close()
    bar.close()


def finish(values: flags.FlagValues, out_dir: Path, text: str) -> None:
    """Says what was written, after the table."""
    print("\n" + text)
    print(f"Written: {out_dir / 'table.md'}, {out_dir / 'curves.png'}")
    if values.report:
        print(f"Written: {ef_report.write([out_dir], bandwidth=values.bandwidth)}")
    print(f"More:    tensorboard --logdir {out_dir / 'tensorboard'}")


def guarded(values: flags.FlagValues, argv: list[str], job: Callable[[], None]) -> None:
    """Runs the job, and turns errors that the user can fix into one line and a non-zero exit."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; every option starts with --")
    if "verbosity" not in values or not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs twenty lines per checkpoint
    try:
        job()
    except (
        UsageError,
        data.DataError,
        storage.OutputError,
        ef_report.ReportError,
        OSError,
    ) as error:
        processes.end(str(error))
    except Exception as error:
        if not processes.lost(error):
            raise
        processes.end(processes.lost_words(error))
    except KeyboardInterrupt:
        print("\ninterrupted; go on with the same command and --resume", file=sys.stderr)
        sys.exit(130)
