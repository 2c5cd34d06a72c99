"""The main job: one model, several ways to send its gradients, the same data in the same order.

```
python -m experiments.train --flagfile=experiments/presets/demo.flags
python -m experiments.train --flagfile=experiments/presets/demo.flags --resume
python -m experiments.train --flagfile=experiments/presets/demo.flags --tune --out_dir=runs/tune
```

Every method trains data-parallel on all devices; a CPU counts as eight. The results appear in
--out_dir: table.md, curves.png, metrics.jsonl, tensorboard/ and checkpoints/, and with --report
report.html. A killed run goes on with --resume and ends with the same numbers to the last bit;
Ctrl-C finishes the epoch and saves.
"""

from __future__ import annotations

import os

# Virtual CPU devices that share few cores wait for each other inside a collective; if the thread
# pool is too small, the last one never gets a thread. JAX reads this when it is imported.
os.environ.setdefault("PJRT_NPROC", "16")

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments import comparison, data, models, processes, report, storage, sweep, tuning, workers
from experiments.arguments import UsageError, parse_floats, parse_methods, parse_rates
from experiments.methods import METHODS, check, compressor, optimizer, period
from experiments.programs import Training

########################################################################################
# Flags
########################################################################################

FLAGS = flags.FLAGS
comparison.define_flags(FLAGS, out_dir="runs/demo", seeds=3)
workers.define_flags(FLAGS)
flags.DEFINE_string(
    "methods",
    ",".join(METHODS),
    f"What to compare: {', '.join(METHODS)}, or expressions of public names with an optimizer "
    "after a bar, as 'sgdm, error_feedback(top_k(0.01)) | sgd(0.3)'. An expression has its own "
    "rates; --lr_drops divides its updates, and the other flags do not change it.",
)
flags.DEFINE_enum("dataset", "digits", data.NAMES, "Images to classify.")
flags.DEFINE_string("data_dir", os.environ.get("EF_OPTAX_DATA"), "Folder with data files.")
flags.DEFINE_enum("model", "mlp", models.NAMES, "Network to train.")
flags.DEFINE_integer("batch_size", 2, "Examples per worker and step.", lower_bound=1)
flags.DEFINE_integer("epochs", 12, "Passes over the training set.", lower_bound=1)
flags.DEFINE_list("lr_drops", ["0.5", "0.75"], "Parts of the run after which the rate is /10.")
flags.DEFINE_integer(
    "block_steps",
    0,
    "Steps per call of the compiled program; 0: 1000, or 1 for convolutions on a "
    "CPU, where XLA computes them five times slower inside a loop.",
    lower_bound=0,
)
flags.DEFINE_bool("tune", False, "Find learning rates on a validation split instead of training.")
flags.DEFINE_list(
    "tune_grid", [f"{rate:.3g}" for rate in np.logspace(-5, 1, 9)], "Rates that --tune tries."
)
flags.DEFINE_float("tune_fraction", 0.2, "Part of the training set that --tune holds out.")
for module in (comparison, workers):
    flags.adopt_module_key_flags(module)


def run() -> None:
    """Trains everything and writes the report."""
    ####################################################################################
    # Check the flags
    ####################################################################################
    methods = parse_methods(FLAGS.methods, METHODS)
    drops = parse_floats("lr_drops", FLAGS.lr_drops)
    grid = parse_floats("tune_grid", FLAGS.tune_grid)
    rates = {} if FLAGS.tune else parse_rates(FLAGS.lr, methods, METHODS)
    comparison.check_flags(FLAGS)
    for name, low, high in (("ratio", 0, 1), ("tune_fraction", 0, 0.9)):
        value: float = getattr(FLAGS, name)
        if not low < value <= high:
            raise UsageError(f"--{name}={value} must lie in ({low}, {high}]")
    if not 0 <= FLAGS.momentum < 1 or FLAGS.weight_decay < 0:
        raise UsageError("--momentum must lie in [0, 1) and --weight_decay must not be negative")
    monitored = (FLAGS.monitor or FLAGS.report) and not FLAGS.tune
    out_dir = storage.folder(FLAGS.out_dir)

    ####################################################################################
    # Workers: one mesh axis over the devices
    ####################################################################################
    team = workers.start(FLAGS)
    for method in methods:
        check(method)  # not earlier: keys of compressors are arrays, and they start JAX

    ####################################################################################
    # Data: uint8 on the host, a block of steps at a time on the devices
    ####################################################################################
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.tune:
        dataset = dataset.hold_out(FLAGS.tune_fraction)
    global_batch = FLAGS.batch_size * team.count
    batches = len(dataset.train_labels) // global_batch
    if batches == 0:
        raise UsageError(
            f"--batch_size={FLAGS.batch_size} x {team.count} workers is more than the "
            f"{len(dataset.train_labels)} training examples; take a smaller batch"
        )
    slow_loop = team.devices[0].platform == "cpu" and FLAGS.model != "mlp"
    blocks = math.ceil(batches / (FLAGS.block_steps or (1 if slow_loop else 1000)))
    block = batches // blocks  # up to blocks - 1 batches of a shuffled epoch are left out
    pixel_mean = dataset.train_images.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    pixel_std = dataset.train_images.std((0, 1, 2), dtype=np.float64).astype(np.float32)

    def epoch_blocks(seed: int, epoch: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The blocks of one epoch, a function of (seed, epoch) alone: a resume repeats it."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(dataset.train_labels))[: blocks * block * global_batch]
        for chosen in order.reshape(blocks, block, global_batch):
            images = dataset.train_images[chosen.ravel()]
            images = data.crop_and_flip(images, rng) if dataset.augment else images
            shape = (block, global_batch, *images.shape[1:])
            yield team.put(images.reshape(shape)), team.put(dataset.train_labels[chosen])

    test_images, test_labels = data.pad_to_batches(
        dataset.test_images, dataset.test_labels, team.count
    )
    test_set = team.put(test_images), team.put(test_labels)

    ####################################################################################
    # Model and loss
    ####################################################################################
    model = models.create(FLAGS.model, dataset.classes)

    def variables(seed: Any) -> Any:
        return model.init(jax.random.key(seed), jnp.zeros(dataset.train_images[:1].shape), True)

    def forward(params: Any, batch_stats: Any, images: jax.Array, train: bool) -> Any:
        images = (images.astype(jnp.float32) - pixel_mean) / pixel_std
        given = {"params": params, "batch_stats": batch_stats}
        return model.apply(given, images, train=train, mutable=["batch_stats"])

    def loss_fn(params: Any, batch: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        logits, changed = forward(params, batch_stats, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), changed.get("batch_stats", {})

    @jax.jit
    def on_test_set(
        params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """(accuracy, mean loss) over all test batches; padding has the label -1."""

        def add(total: jax.Array, batch: Any) -> tuple[jax.Array, None]:
            images, labels = batch
            logits, _ = forward(params, batch_stats, images, train=False)
            real = labels >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.abs(labels))
            right = jnp.sum(real & (logits.argmax(-1) == labels), dtype=jnp.float32)
            return total + jnp.stack([right, jnp.where(real, losses, 0).sum()]), None

        total, _ = jax.lax.scan(add, jnp.zeros(2), (images, labels))
        return total / len(dataset.test_labels)

    def evaluate(params: Any, batch_stats: Any) -> dict[str, float]:
        accuracy, loss = np.asarray(on_test_set(params, batch_stats, *test_set))
        loss = float(np.nan_to_num(loss, nan=1e30, posinf=1e30))  # JSON's limits
        return {"test_loss": loss, "test_accuracy": float(accuracy)}

    task = comparison.Task(
        training=Training(variables, loss_fn, epoch_blocks, block, blocks),
        optimizer=optimizer,
        compressor=compressor,
        evaluate=evaluate,
        rate=lambda rate, epoch: rate / 10 ** sum(epoch >= drop * FLAGS.epochs for drop in drops),
        shown=lambda row: f"{row['test_accuracy']:.2%}",
        logged=("train_loss", "test_loss", "test_accuracy", "learning_rate"),
        epochs=FLAGS.epochs,
        monitored=monitored,
        period=period,
    )

    ####################################################################################
    # Output folder: nothing is touched until everything above has been checked
    ####################################################################################
    parameters = count_parameters(model, dataset)
    decisive = ("dataset", "model", "batch_size", "epochs", "ratio", "momentum", "weight_decay")
    arrays = [getattr(dataset, f"{s}_{x}") for s in ("train", "test") for x in ("images", "labels")]
    config = {
        "flags": {name: FLAGS[name].value for name in (*decisive, "seeds", "block_steps")}
        | {"methods": methods, "workers": team.count, "lr": rates, "lr_drops": drops}
        | ({"monitor": True} if monitored else {}),
        "versions": comparison.versions(team.devices),
        "data": {"the data with checksum": processes.fingerprint(arrays)},
        "about": {
            "command": "python -m experiments.train " + shlex.join(sys.argv[1:]),
            "hardware": team.hardware(),
            "parameters": parameters,
            "dense_bytes": 4 * parameters,
            "steps_per_epoch": blocks * block,
        },
    }
    comparison.prepare(FLAGS, out_dir, config, FLAGS.resume and not FLAGS.tune)
    if comparison.is_writer():
        print(
            f"{FLAGS.dataset}: {len(dataset.train_labels):,} training and "
            f"{len(dataset.test_labels):,} {'validation' if FLAGS.tune else 'test'} images; "
            f"{FLAGS.model}: {parameters:,} parameters; {team.count} workers x batch "
            f"{FLAGS.batch_size}, {blocks * block} steps an epoch; {config['about']['hardware']}"
        )
        print("methods: " + ", ".join(methods))

    ####################################################################################
    # Tuning: the whole run for each rate, or the comparison
    ####################################################################################
    if FLAGS.tune:
        tuning.tune(FLAGS, task, team, out_dir, methods, grid, config["about"]["command"])
        return
    comparison.compare(FLAGS, task, team, out_dir, rates)
    if comparison.is_writer():
        comparison.finish(FLAGS, out_dir, report.write(out_dir))


def count_parameters(model: Any, dataset: data.Dataset) -> int:
    """Number of parameters, computed without creating any."""
    sample = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), sample)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def job() -> None:
    """The run, or all runs of --sweep."""
    sweep.run(FLAGS, run)


def main(argv: list[str], job: Callable[[], None] = job) -> None:
    """Runs the job, and turns errors that the user can fix into one line and a non-zero exit."""
    comparison.guarded(FLAGS, argv, job)


if __name__ == "__main__":
    app.run(main)
