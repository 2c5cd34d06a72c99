"""A language model, several ways to send its gradients, the same text in the same order.

```
python -m experiments.lm                                   # the sonnets, a minute on a CPU
python -m experiments.lm --flagfile=experiments/presets/lm_gpu.flags --data_dir=DIR
python -m experiments.lm --methods='adamw, error_feedback(top_k(0.01)) | adamw(cosine(3e-3))'
```

A decoder-only transformer learns to predict the next character, byte or token. Workers are devices,
rows of devices that share a model (--fsdp), or simulated on one device (--simulate). Everything
else is as in `experiments.train`: the output folder, --resume, Ctrl-C, --monitor, --report.
"""

from __future__ import annotations

import os

os.environ.setdefault("PJRT_NPROC", "16")  # see experiments/train.py

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import PartitionSpec

from experiments import comparison, processes, report, storage, sweep, text, workers
from experiments.arguments import UsageError
from experiments.lm_methods import SHORT, Methods
from experiments.programs import Training
from experiments.transformer import SIZES, Transformer

FLAGS = flags.FlagValues()
"""Its own, so that one process can import other jobs as well."""

_GIVEN: dict[str, Any] = {"flag_values": FLAGS}
_MOST_BYTES = 1 << 26
"""Of the batches of one call of the compiled program, if --block_steps does not say."""

comparison.define_flags(FLAGS, out_dir="runs/lm", seeds=1)
workers.define_flags(FLAGS)
flags.DEFINE_string(
    "methods",
    "adamw, ef_top_k",
    f"What to compare: {', '.join(SHORT)}, or expressions of public names with an optimizer after "
    "a bar, as 'error_feedback(top_k(0.01)) | adamw(cosine(3e-3))'. cosine(PEAK) is the schedule "
    "of the short names.",
    **_GIVEN,
)
flags.DEFINE_float("warmup", 0.1, "Part of the steps in which cosine(PEAK) rises.", **_GIVEN)
flags.DEFINE_enum("size", "0.2M", list(SIZES), "Of the model, by name.", **_GIVEN)
flags.DEFINE_integer("length", 64, "Tokens of a sequence.", lower_bound=2, **_GIVEN)
flags.DEFINE_integer("batch_size", 4, "Sequences per worker and step.", lower_bound=1, **_GIVEN)
flags.DEFINE_integer("steps", 200, "Steps of a run.", lower_bound=1, **_GIVEN)
flags.DEFINE_integer("eval_every", 50, "Steps between evaluations.", lower_bound=1, **_GIVEN)
flags.DEFINE_integer("eval_tokens", 16_384, "Held-out tokens looked at.", lower_bound=1, **_GIVEN)
flags.DEFINE_string(
    "data_dir",
    None,
    "A text, a folder of texts or of token files (.bin); default: the bundled sonnets.",
    **_GIVEN,
)
flags.DEFINE_enum("units", "characters", text.UNITS, "Tokens of a text.", **_GIVEN)
flags.DEFINE_integer(
    "vocabulary", 0, "Of token files; 0: as large as they need.", lower_bound=0, **_GIVEN
)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations and products.", **_GIVEN
)
flags.DEFINE_bool("remat", False, "Keep only what goes into each block of the model.", **_GIVEN)
flags.DEFINE_integer(
    "accumulate", 1, "Parts of a worker's batch, one after the other.", lower_bound=1, **_GIVEN
)
flags.DEFINE_integer(
    "fsdp", 1, "Devices of a worker, each with a part of the model.", lower_bound=1, **_GIVEN
)
flags.DEFINE_bool("simulate", False, "All workers on one device, 8 unless --workers.", **_GIVEN)
flags.DEFINE_integer(
    "block_steps",
    0,
    "Steps per call of the compiled program; 0: all between two evaluations, if their batches are "
    "small enough.",
    lower_bound=0,
    **_GIVEN,
)


class Job(NamedTuple):
    """What the flags say, before anything is trained or written.

    Attributes:
      out_dir: where the results go.
      team: the workers.
      task: the model, the data and the optimizers.
      methods: what is compared.
      config: what config.json says of the run.
      heading: the first line that is printed.
    """

    out_dir: Path
    team: workers.Workers
    task: comparison.Task
    methods: Methods
    config: dict[str, Any]
    heading: str


def run() -> None:
    """Trains everything and writes the report."""
    job = prepare()
    comparison.prepare(FLAGS, job.out_dir, job.config, FLAGS.resume)
    if comparison.is_writer():
        print(job.heading)
        for method, expression in job.methods.expressions.items():
            print(f"{method}: {expression}" if method != expression else method)
    comparison.compare(FLAGS, job.task, job.team, job.out_dir, job.methods.rates)
    if comparison.is_writer():
        comparison.finish(FLAGS, job.out_dir, report.write(job.out_dir))


def prepare() -> Job:
    """Checks the flags, and makes everything that the runs need."""
    ####################################################################################
    # Check the flags
    ####################################################################################
    comparison.check_flags(FLAGS)
    if FLAGS.steps % FLAGS.eval_every:
        raise UsageError(f"--steps={FLAGS.steps} is no multiple of --eval_every={FLAGS.eval_every}")
    if FLAGS.batch_size % FLAGS.accumulate:
        raise UsageError(
            f"--batch_size={FLAGS.batch_size} is no multiple of --accumulate={FLAGS.accumulate}"
        )
    if not 0 <= FLAGS.warmup < 1:
        raise UsageError(f"--warmup={FLAGS.warmup} must lie in [0, 1)")
    if FLAGS.simulate and FLAGS.fsdp > 1:
        raise UsageError("--simulate: all workers are on one device, so --fsdp must be 1")
    out_dir = storage.folder(FLAGS.out_dir)
    team = workers.start(FLAGS, FLAGS.fsdp, FLAGS.simulate)
    methods = Methods(FLAGS.methods, FLAGS.lr, FLAGS.steps, FLAGS.warmup)

    ####################################################################################
    # Data: windows of the text, a block of steps at a time on the devices
    ####################################################################################
    corpus = text.load(FLAGS.data_dir, FLAGS.units, FLAGS.vocabulary)
    length = FLAGS.length + 1  # the model sees all but the last and predicts all but the first
    for part, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if not tokens.starts(length):
            raise UsageError(
                f"--length={FLAGS.length}: no {part} file of {corpus.name} has {length} tokens"
            )
    global_batch = FLAGS.batch_size * team.count
    if FLAGS.batch_size % FLAGS.fsdp:
        raise UsageError(f"--batch_size={FLAGS.batch_size} is no multiple of --fsdp={FLAGS.fsdp}")
    most = FLAGS.block_steps or max(1, _MOST_BYTES // (4 * global_batch * length))
    block = max(
        n for n in range(1, FLAGS.eval_every + 1) if FLAGS.eval_every % n == 0 and n <= most
    )
    blocks = FLAGS.eval_every // block

    def epoch_blocks(seed: int, epoch: int) -> Iterator[jax.Array]:
        """The blocks between two evaluations, a function of (seed, epoch) alone."""
        rng = np.random.default_rng([seed, epoch])
        shape = (blocks, block, global_batch)
        for starts in rng.integers(0, corpus.train.starts(length), shape):
            yield team.put(corpus.train.windows(starts, length))

    held_out = corpus.held_out.spread(max(1, FLAGS.eval_tokens // FLAGS.length), length)
    test_set, real = batched(held_out, team.mesh.size)
    test_set, real = team.put(test_set), team.put(real)

    ####################################################################################
    # Model and loss
    ####################################################################################
    model = Transformer(corpus.vocabulary, SIZES[FLAGS.size], jnp.dtype(FLAGS.dtype), FLAGS.remat)

    def variables(seed: Any) -> Any:
        return model.init(jax.random.key(seed), jnp.zeros((1, FLAGS.length), jnp.int32))

    def losses_of(params: Any, windows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])

    def loss_fn(params: Any, windows: jax.Array, batch_stats: Any) -> tuple[jax.Array, Any]:
        return losses_of(params, windows).mean(), batch_stats

    @jax.jit
    def on_held_out(params: Any, test_set: jax.Array, real: jax.Array) -> jax.Array:
        def add(total: jax.Array, batch: Any) -> tuple[jax.Array, None]:
            windows, real = batch
            return total + jnp.sum(losses_of(params, windows).mean(1) * real), None

        return jax.lax.scan(add, jnp.zeros(()), (test_set, real))[0] / len(held_out)

    def evaluate(params: Any, batch_stats: Any) -> dict[str, float]:
        del batch_stats
        nats = float(np.nan_to_num(on_held_out(params, test_set, real), nan=1e30, posinf=1e30))
        if corpus.characters is None:
            return {"test_loss": nats}
        return {"test_loss": nats, "bits_per_character": nats / math.log(2) / corpus.characters}

    def shown(row: dict[str, Any]) -> str:
        bits = row.get("bits_per_character")
        return f"{row['test_loss']:.4f} nats" + ("" if bits is None else f", {bits:.4f} bits")

    shapes = jax.eval_shape(variables, 0)["params"]
    specs = None if FLAGS.fsdp == 1 else jax.tree.map(split_over(FLAGS.fsdp), shapes)
    task = comparison.Task(
        training=Training(variables, loss_fn, epoch_blocks, block, blocks, FLAGS.accumulate, specs),
        optimizer=methods.optimizer,
        compressor=methods.compressor,
        evaluate=evaluate,
        rate=lambda rate, epoch: rate,
        shown=shown,
        logged=("train_loss", "test_loss"),
        epochs=FLAGS.steps // FLAGS.eval_every,
        unit="interval",
        monitored=FLAGS.monitor or FLAGS.report,
        period=methods.period,
    )

    ####################################################################################
    # What the output folder says of the run
    ####################################################################################
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    decisive = ("size", "length", "batch_size", "steps", "eval_every", "eval_tokens", "warmup")
    decisive += ("units", "vocabulary", "dtype", "remat", "accumulate", "fsdp", "simulate", "seeds")
    config: dict[str, Any] = {
        "flags": {name: FLAGS[name].value for name in decisive}
        | {"methods": list(methods.rates), "workers": team.count, "lr": methods.rates}
        | {"text": corpus.name, "block_steps": block}
        | ({"monitor": True} if task.monitored else {}),
        "versions": comparison.versions(team.devices),
        "data": {
            "the data with checksum": processes.fingerprint([*corpus.train, *corpus.held_out])
        },
        "about": {
            "command": "python -m experiments.lm " + shlex.join(sys.argv[1:]),
            "hardware": team.hardware(),
            "parameters": parameters,
            "dense_bytes": 4 * parameters,
            "steps_per_epoch": blocks * block,
            "tokens_per_step": global_batch * FLAGS.length,
            "expressions": methods.expressions,
            "characters": corpus.characters,
            "quantity": "loss",
        },
    }
    heading = (
        f"{corpus.name}: {len(corpus.train):,} training and {len(corpus.held_out):,} held-out "
        f"tokens, vocabulary {corpus.vocabulary:,}; {FLAGS.size}: {parameters:,} parameters; "
        f"{team.count} workers x {FLAGS.batch_size} sequences of {FLAGS.length}, "
        f"{FLAGS.steps} steps; {config['about']['hardware']}"
    )
    return Job(out_dir, team, task, methods, config, heading)


def batched(rows: np.ndarray, devices: int, most: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(batches, rows, ...) with rows divisible by `devices`, and 1 for each that is no padding."""
    size = -(-min(len(rows), most) // devices) * devices
    batches = -(-len(rows) // size)
    padding = batches * size - len(rows)
    padded = np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)])
    real = (np.arange(batches * size) < len(rows)).astype(np.float32)
    return padded.reshape(batches, size, *rows.shape[1:]), real.reshape(batches, size)


def split_over(devices: int) -> Callable[[Any], PartitionSpec]:
    """Leaf -> spec: its longest axis that divides is split over the devices of a worker."""

    def spec(leaf: Any) -> PartitionSpec:
        fits = [axis for axis, n in enumerate(leaf.shape) if n % devices == 0 and n]
        if not fits:
            return PartitionSpec()
        axis = max(fits, key=lambda axis: (leaf.shape[axis], axis))
        return PartitionSpec(*[None] * axis, workers.INSIDE)

    return spec


def main(argv: list[str]) -> None:
    """Parses the flags and runs; what the user can fix becomes one line and a failing exit."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print((__doc__ or "") + "\nFlags:\n" + FLAGS.get_help())
        return
    FLAGS.unparse_flags()
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    comparison.guarded(FLAGS, rest, lambda: sweep.run(FLAGS, run))


if __name__ == "__main__":
    main(sys.argv)
