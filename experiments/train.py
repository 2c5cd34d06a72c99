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

import functools
import importlib.metadata
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

import ef_optax as ef
from ef_optax import report as ef_report
from experiments import data, models, processes, report, storage
from experiments.arguments import UsageError, parse_floats, parse_methods, parse_rates
from experiments.methods import AXIS, METHODS, check, compressor, optimizer
from experiments.tuning import robust_rate, tuning_table

########################################################################################
# Flags
########################################################################################

flags.DEFINE_string(
    "methods",
    ",".join(METHODS),
    f"What to compare: {', '.join(METHODS)}, or expressions of public names with an optimizer "
    "after a bar, as 'sgdm, error_feedback(top_k(0.01)) | sgd(0.3)'. An expression has its own "
    "rates; --lr_drops divides its updates, and the other flags do not change it.",
)
flags.DEFINE_list("lr", [], "Learning rates as method=rate,...; --tune finds them.")
flags.DEFINE_integer("seeds", 3, "Runs per method; seed s decides start and order of the data.")
flags.DEFINE_enum("dataset", "digits", data.NAMES, "Images to classify.")
flags.DEFINE_string("data_dir", os.environ.get("EF_OPTAX_DATA"), "Folder with data files.")
flags.DEFINE_enum("model", "mlp", models.NAMES, "Network to train.")
flags.DEFINE_integer("batch_size", 2, "Examples per worker and step.", lower_bound=1)
flags.DEFINE_integer("workers", 0, "Devices to use; 0: all (8 on a CPU).", lower_bound=0)
flags.DEFINE_integer("epochs", 12, "Passes over the training set.", lower_bound=1)
flags.DEFINE_list("lr_drops", ["0.5", "0.75"], "Parts of the run after which the rate is /10.")
flags.DEFINE_string("out_dir", "runs/demo", "Where the results go.")
flags.DEFINE_bool("resume", False, "Continue what --out_dir holds, bit-exactly.")
flags.DEFINE_bool("overwrite", False, "Replace what --out_dir holds, even with --resume.")
flags.DEFINE_integer("checkpoint_every", 1, "Epochs between checkpoints.", lower_bound=1)
flags.DEFINE_integer(
    "block_steps",
    0,
    "Steps per call of the compiled program; 0: 1000, or 1 for convolutions on a "
    "CPU, where XLA computes them five times slower inside a loop.",
    lower_bound=0,
)
flags.DEFINE_bool(
    "monitor", False, "Record what the exchanges send and drop, by layer, once an epoch."
)
flags.DEFINE_bool("report", False, "Monitor, and write report.html with advice and its reasons.")
flags.DEFINE_float(
    "bandwidth", None, "Of a worker's link, in bits per second: the report has seconds too."
)
flags.DEFINE_bool("tune", False, "Find learning rates on a validation split instead of training.")
flags.DEFINE_list(
    "tune_grid", [f"{rate:.3g}" for rate in np.logspace(-5, 1, 9)], "Rates that --tune tries."
)
flags.DEFINE_float("tune_fraction", 0.2, "Part of the training set that --tune holds out.")
flags.DEFINE_bool("multihost", False, "Call jax.distributed.initialize(): one process per host.")
flags.DEFINE_string("coordinator", None, "host:port of process 0 where JAX cannot find it itself.")
flags.DEFINE_integer("num_processes", None, "Number of processes where JAX cannot find it itself.")
flags.DEFINE_integer("process_id", None, "This process where JAX cannot find it itself.")
flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for other processes.", lower_bound=1)
FLAGS = flags.FLAGS


class State(NamedTuple):
    """What a run carries from step to step, and all that a checkpoint holds."""

    params: Any
    batch_stats: Any  # BatchNorm's running averages; empty for mlp and cnn
    opt_state: Any


class Programs(NamedTuple):
    """The compiled programs of one method; learning rate and seed are inputs."""

    tx: ef.parallel.Lifted
    create: Callable[[int], State]
    run_block: Callable[..., tuple[State, jax.Array]]
    wire: dict[str, int]


def run() -> None:
    """Trains everything and writes the report."""
    ####################################################################################
    # Check the flags
    ####################################################################################
    methods = parse_methods(FLAGS.methods, METHODS)
    drops = parse_floats("lr_drops", FLAGS.lr_drops)
    grid = parse_floats("tune_grid", FLAGS.tune_grid)
    rates = {} if FLAGS.tune else parse_rates(FLAGS.lr, methods, METHODS)
    if FLAGS.seeds < 1:
        raise UsageError(f"--seeds={FLAGS.seeds}: at least one run per method is needed")
    for name, low, high in (("ratio", 0, 1), ("tune_fraction", 0, 0.9)):
        value: float = getattr(FLAGS, name)
        if not low < value <= high:
            raise UsageError(f"--{name}={value} must lie in ({low}, {high}]")
    if not 0 <= FLAGS.momentum < 1 or FLAGS.weight_decay < 0:
        raise UsageError("--momentum must lie in [0, 1) and --weight_decay must not be negative")
    if FLAGS.bandwidth is not None and not FLAGS.bandwidth > 0:
        raise UsageError(f"--bandwidth={FLAGS.bandwidth} must be positive")
    if FLAGS.report:
        ef_report.require()
    monitored = (FLAGS.monitor or FLAGS.report) and not FLAGS.tune
    out_dir = storage.folder(FLAGS.out_dir)

    ####################################################################################
    # Workers: one mesh axis over the devices
    ####################################################################################
    if FLAGS.multihost:
        processes.join(
            FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.connect_timeout
        )
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", FLAGS.workers or 8)
    devices = jax.devices()
    workers = FLAGS.workers or len(devices)
    if workers > len(devices):
        raise UsageError(f"--workers={workers}, but there are {len(devices)} devices")
    if FLAGS.multihost and workers < len(devices):
        raise UsageError(f"--workers={workers}: --multihost uses all {len(devices)} devices")
    mesh = jax.make_mesh(
        (workers,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:workers]
    )
    for method in methods:
        check(method)  # not earlier: keys of compressors are arrays, and they start JAX
    writer = jax.process_index() == 0  # only this process writes files and prints
    replicated = NamedSharding(mesh, PartitionSpec())
    by_step = NamedSharding(mesh, PartitionSpec(None, AXIS))  # (steps, examples, ...)

    ####################################################################################
    # Data: uint8 on the host, a block of steps at a time on the devices
    ####################################################################################
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.tune:
        dataset = dataset.hold_out(FLAGS.tune_fraction)
    global_batch = FLAGS.batch_size * workers
    batches = len(dataset.train_labels) // global_batch
    if batches == 0:
        raise UsageError(
            f"--batch_size={FLAGS.batch_size} x {workers} workers is more than the "
            f"{len(dataset.train_labels)} training examples; take a smaller batch"
        )
    slow_loop = devices[0].platform == "cpu" and FLAGS.model != "mlp"
    blocks = math.ceil(batches / (FLAGS.block_steps or (1 if slow_loop else 1000)))
    block = batches // blocks  # up to blocks - 1 batches of a shuffled epoch are left out
    pixel_mean = dataset.train_images.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    pixel_std = dataset.train_images.std((0, 1, 2), dtype=np.float64).astype(np.float32)

    def put(array: np.ndarray) -> jax.Array:
        """Shards a (steps, examples, ...) array; each process contributes its own columns."""
        local = np.split(array, jax.process_count(), axis=1)[jax.process_index()]
        return jax.make_array_from_process_local_data(by_step, local, array.shape)

    def epoch_blocks(seed: int, epoch: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The blocks of one epoch, a function of (seed, epoch) alone: a resume repeats it."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(dataset.train_labels))[: blocks * block * global_batch]
        for chosen in order.reshape(blocks, block, global_batch):
            images = dataset.train_images[chosen.ravel()]
            images = data.crop_and_flip(images, rng) if dataset.augment else images
            shape = (block, global_batch, *images.shape[1:])
            yield put(images.reshape(shape)), put(dataset.train_labels[chosen])

    test_images, test_labels = data.pad_to_batches(
        dataset.test_images, dataset.test_labels, workers
    )
    test_set = put(test_images), put(test_labels)

    ####################################################################################
    # Model and loss
    ####################################################################################
    model = models.create(FLAGS.model, dataset.classes)

    def forward(params: Any, batch_stats: Any, images: jax.Array, train: bool) -> Any:
        images = (images.astype(jnp.float32) - pixel_mean) / pixel_std
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, train=train, mutable=["batch_stats"])

    def loss_fn(params: Any, batch: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        logits, changed = forward(params, batch_stats, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), changed.get("batch_stats", {})

    @jax.jit
    def evaluate(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
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

    @functools.partial(jax.jit, out_shardings=replicated)
    def over_workers(losses: jax.Array) -> jax.Array:
        """(steps, workers) -> (steps,): not in the training program, whose bytes are counted."""
        return losses.mean(1)

    ####################################################################################
    # Programs of a method: create a state, run a block of steps
    ####################################################################################
    def build(method: str) -> Programs:
        chain = optimizer(method)
        tx = ef.data_parallel(ef.monitor(chain) if monitored else chain, mesh, AXIS)
        value_and_grad = ef.worker_value_and_grad(loss_fn, mesh, AXIS, has_aux=True, aux_mean=True)

        @functools.partial(jax.jit, out_shardings=replicated)
        def variables(seed: int) -> Any:
            return model.init(jax.random.key(seed), jnp.zeros(dataset.train_images[:1].shape), True)

        def create(seed: int) -> State:
            made = variables(seed)
            opt_state = tx.init(made["params"])
            return State(made["params"], made.get("batch_stats", {}), opt_state)

        def step(state: State, batch: Any) -> tuple[State, jax.Array]:
            points = ef.query_points(state.opt_state, state.params)
            (losses, stats), grads = value_and_grad(points, batch, state.batch_stats)
            updates, opt_state = tx.update(
                grads["params"], state.opt_state, state.params, grads=grads
            )
            # If any worker has a NaN, all workers skip the step and its BatchNorm averages.
            stats = jax.tree.map(
                lambda new, old: jnp.where(jnp.isfinite(new), new, old), stats, state.batch_stats
            )
            return State(optax.apply_updates(state.params, updates), stats, opt_state), losses

        def run_block(
            state: State, rate: jax.Array, images: jax.Array, labels: jax.Array
        ) -> tuple[State, jax.Array]:
            opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
            state = state._replace(opt_state=opt_state)
            if block == 1:  # not even a loop of one round, see --block_steps
                state, losses = step(state, (images[0], labels[0]))
                return state, losses[None]
            return jax.lax.scan(step, state, (images, labels))

        state = create(0)
        keep = jax.tree.map(lambda x: x.sharding, state)
        jitted = jax.jit(run_block, donate_argnums=0, out_shardings=(keep, None))
        example = next(epoch_blocks(0, 0))
        compiled = jitted.lower(state, np.float32(0), *example).compile()
        return Programs(tx, create, compiled, measure(method, compiled, state.params))

    def measure(method: str, compiled: Any, params: Any) -> dict[str, int]:
        """Bytes that one worker sends in one step, read from the compiled program.

        What only some of the steps send counts in full, and the result is said to be a bound.
        """
        if workers == 1:
            codec = compressor(method).codec
            bits = [codec.bits(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
            return {"message_bytes": math.ceil(sum(bits) / 8), "link_bytes": 0}
        totals = {"message_bytes": 0.0, "link_bytes": 0.0}
        collectives = ef.wire_report(compiled).collectives
        for item in collectives:
            # A collective in the loop is listed once, with the number of its executions.
            share = 1 if item.times is None else item.times / block
            totals["message_bytes"] += share * item.message_bytes
            totals["link_bytes"] += share * item.link_bytes
        found = {name: round(total) for name, total in totals.items()}
        return found | ({"at_most": True} if any(x.conditional for x in collectives) else {})

    ####################################################################################
    # One epoch
    ####################################################################################
    def train_epoch(
        programs: Programs, state: State, rate: float, seed: int, epoch: int
    ) -> tuple[State, dict[str, Any]]:
        """Trains the epoch with this 0-based number; returns the new state and what to log."""
        start = time.perf_counter()
        rate /= 10 ** sum(epoch >= drop * FLAGS.epochs for drop in drops)
        parts = []
        for images, labels in epoch_blocks(seed, epoch):
            state, losses = programs.run_block(state, np.float32(rate), images, labels)
            parts.append(np.asarray(over_workers(losses)))
            bar.update()
        means = np.concatenate(parts)
        finite = np.isfinite(means)
        accuracy, test_loss = np.asarray(evaluate(state.params, state.batch_stats, *test_set))
        row = {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": float(means[finite].mean()) if finite.any() else math.nan,
            "test_loss": float(np.nan_to_num(test_loss, nan=1e30, posinf=1e30)),  # JSON's limits
            "test_accuracy": float(accuracy),
            "skipped_steps": int(np.sum(~finite)),
            "lost": not finite[-100:].any(),
            "seconds": round(time.perf_counter() - start, 3),
        }
        if monitored:
            row["monitor"] = ef.measure.summary(state.opt_state, by="leaf")
        return state, row

    ####################################################################################
    # Output folder: nothing is touched until everything above has been checked
    ####################################################################################
    parameters = count_parameters(model, dataset)
    decisive = ("dataset", "model", "batch_size", "epochs", "ratio", "momentum", "weight_decay")
    config = {
        "flags": {name: FLAGS[name].value for name in (*decisive, "seeds", "block_steps")}
        | {"methods": methods, "workers": workers, "lr": rates, "lr_drops": drops}
        | ({"monitor": True} if monitored else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")}
        | {"ef_optax": ef.__version__, "device": devices[0].device_kind},
        "about": {
            "command": "python -m experiments.train " + shlex.join(sys.argv[1:]),
            "hardware": hardware(devices, workers),
            "parameters": parameters,
            "dense_bytes": 4 * parameters,
            "steps_per_epoch": blocks * block,
        },
    }
    storage.check_free(out_dir, config, FLAGS.resume and not FLAGS.tune, FLAGS.overwrite)
    if FLAGS.multihost:
        multihost_utils.sync_global_devices("the output folder was checked by all")
    if writer:
        storage.start(out_dir, config, FLAGS.overwrite)
        print(
            f"{FLAGS.dataset}: {len(dataset.train_labels):,} training and "
            f"{len(dataset.test_labels):,} {'validation' if FLAGS.tune else 'test'} images; "
            f"{FLAGS.model}: {parameters:,} parameters; {workers} workers x batch "
            f"{FLAGS.batch_size}, {blocks * block} steps an epoch; {config['about']['hardware']}"
        )
        print("methods: " + ", ".join(methods))
    stop = processes.Stop()
    attempts = len(grid) if FLAGS.tune else 1
    bar = tqdm(
        total=attempts * len(methods) * FLAGS.seeds * FLAGS.epochs * blocks,
        unit="block" if blocks > 1 else "epoch",
        disable=not (writer and sys.stderr.isatty()),
        dynamic_ncols=True,
    )

    ####################################################################################
    # Tuning: the whole run for each rate, on the training set less a validation part
    ####################################################################################
    if FLAGS.tune:
        chosen, lines = {}, []
        for method in methods:
            programs = build(method)
            scores = {}
            for rate in grid:
                results = []
                for seed in range(FLAGS.seeds):
                    state, row = programs.create(seed), {}
                    for epoch in range(FLAGS.epochs):
                        state, row = train_epoch(programs, state, rate, seed, epoch)
                        bar.set_postfix_str(f"{method} {rate:g}: {row['test_accuracy']:.1%}")
                        if stop.agreed():
                            raise KeyboardInterrupt
                        if row["lost"]:
                            row["test_accuracy"], row["test_loss"] = 0.0, 1e30
                            bar.update((FLAGS.epochs - epoch - 1) * blocks)
                            break
                    results.append((row["test_accuracy"], -row["test_loss"]))
                scores[rate] = tuple(np.mean(results, axis=0))
            chosen[method] = robust_rate(scores)
            lines.append((method, scores))
            edge = ", the edge of the grid" if chosen[method] in (min(grid), max(grid)) else ""
            if writer:
                tqdm.write(f"{method}: best rate {chosen[method]:g}{edge}")
        bar.close()
        if writer:
            text = tuning_table(grid, lines, chosen, config["about"]["command"])
            storage.write_text(out_dir / "tuning.md", text)
            print("\n" + text)
        return

    ####################################################################################
    # The comparison: method by method, seed by seed, epoch by epoch
    ####################################################################################
    folders = {(m, s): storage.run_dir(out_dir, m, s) for m in methods for s in range(FLAGS.seeds)}
    done = {run: storage.last_epoch(folder) for run, folder in folders.items()}
    if FLAGS.multihost:
        multihost_utils.sync_global_devices("all processes know what is done")
    if writer:
        storage.forget_unsaved(out_dir, done)
    wire_path = out_dir / "wire.json"
    wire = storage.read_json(wire_path) if writer and wire_path.exists() else {}
    bar.initial = bar.n = blocks * sum(done.values())
    if writer and any(done.values()):
        print(f"resumed: {sum(done.values())} of {bar.total // blocks} epochs were done before")

    for method in methods:
        if all(done[method, seed] == FLAGS.epochs for seed in range(FLAGS.seeds)):
            continue
        programs = build(method)
        if writer:
            wire[method] = programs.wire
            storage.write_text(wire_path, json.dumps(wire, indent=2) + "\n")
        for seed in range(FLAGS.seeds):
            first = done[method, seed]
            if first == FLAGS.epochs:
                continue
            state = programs.create(seed)
            if first:
                state = storage.restore(folders[method, seed], first, programs.tx, state)
            events = out_dir / "tensorboard" / storage.run_name(method, seed)
            board = SummaryWriter(str(events), purge_step=first + 1) if writer else None
            for epoch in range(first, FLAGS.epochs):
                state, row = train_epoch(programs, state, rates[method], seed, epoch)
                if row.pop("lost"):
                    raise UsageError(
                        f"{method}, seed {seed}: the loss is not finite at the end of epoch "
                        f"{epoch + 1} and all workers skip every step; --lr={method}="
                        f"{rates[method]:g} is probably too large. Finished epochs are kept in "
                        f"{out_dir}"
                    )
                bar.set_postfix_str(f"{method} seed {seed}: {row['test_accuracy']:.1%}")
                stopping = stop.agreed()
                if board:
                    storage.append_row(out_dir, {"method": method, "seed": seed, **row})
                    for name in ("train_loss", "test_loss", "test_accuracy", "learning_rate"):
                        board.add_scalar(name, row[name], epoch + 1)
                    for name, value in row.get("monitor", {}).items():
                        board.add_scalar(f"monitor/{name}", value, epoch + 1)
                last = epoch + 1 == FLAGS.epochs
                if last or stopping or (epoch + 1) % FLAGS.checkpoint_every == 0:
                    storage.save(folders[method, seed], epoch + 1, programs.tx, state)
                if stopping:
                    raise KeyboardInterrupt
                if last and writer and bar.disable:
                    print(f"{method} seed {seed}: {row['test_accuracy']:.2%}", flush=True)
            if board:
                board.close()
    bar.close()

    ####################################################################################
    # Report
    ####################################################################################
    if writer:
        print("\n" + report.write(out_dir))
        print(f"Written: {out_dir / 'table.md'}, {out_dir / 'curves.png'}")
        if FLAGS.report:
            print(f"Written: {ef_report.write([out_dir], bandwidth=FLAGS.bandwidth)}")
        print(f"More:    tensorboard --logdir {out_dir / 'tensorboard'}")


########################################################################################
# Small helpers
########################################################################################


def count_parameters(model: Any, dataset: data.Dataset) -> int:
    """Number of parameters, computed without creating any."""
    sample = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), sample)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def hardware(devices: list[Any], workers: int) -> str:
    """One phrase for the report."""
    if devices[0].platform != "cpu":
        return f"{workers} x {devices[0].device_kind}"
    return f"{workers} virtual CPU device{'s' if workers > 1 else ''} on {os.cpu_count()} cores"


def main(argv: list[str], job: Callable[[], None] = run) -> None:
    """Runs the job, and turns errors that the user can fix into one line and a non-zero exit."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; every option starts with --")
    if not FLAGS["verbosity"].present:
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
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; go on with the same command and --resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
