"""Short runs of a small perceptron with many seeds, for comparisons of rules and their options.

All seeds of a method run in one compiled program, because compilation takes most of the time of
such a comparison. The workers are simulated. A run has several stretches, which share the program.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import ef_optax as ef
from experiments import data, models

AXIS = "data"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of the task."""
    given = {"flag_values": values}
    flags.DEFINE_enum("dataset", "digits", data.NAMES, "What is learned.", **given)
    flags.DEFINE_string("data_dir", None, "The folder of its files, if it needs any.", **given)
    flags.DEFINE_integer("train_images", 0, "The first of them only; 0: all.", 0, **given)
    flags.DEFINE_list("hidden", ["128"], "Widths of the perceptron's hidden layers.", **given)
    flags.DEFINE_integer("workers", 8, "Simulated workers.", 1, **given)
    flags.DEFINE_integer("batch_size", 2, "Examples of each worker.", 1, **given)
    flags.DEFINE_integer("epochs", 12, "Passes over the training set.", 1, **given)
    flags.DEFINE_integer("stretches", 6, "Parts of a run; they divide the epochs.", 1, **given)
    flags.DEFINE_integer("seeds", 3, "Runs of every method.", 2, **given)
    flags.DEFINE_float("lr", 0.3, "Divided by 10 after half of the steps.", 0, **given)


class Carry(NamedTuple):
    """The state of the runs of all seeds, between two stretches."""

    params: Any
    state: Any  # of the optimizer
    stretch: int = 0  # how many are finished


class Task:
    """A data set, a perceptron, and the order of the examples for every seed."""

    def __init__(self, values: flags.FlagValues) -> None:
        hidden = _widths(values.hidden)
        found = data.load(values.dataset, values.data_dir)
        count = values.train_images or len(found.train_labels)
        train = found.train_images[:count].astype(np.float32)
        center, scale = train.mean(), train.std()
        self.train = (train - center) / scale, found.train_labels[:count]
        self.test = (found.test_images.astype(np.float32) - center) / scale, found.test_labels
        self.workers, self.batch, self.seeds = values.workers, values.batch_size, values.seeds
        self.stretches, self.epochs = values.stretches, values.epochs
        if values.epochs % self.stretches:
            raise flags.IllegalFlagValueError(
                f"flag --stretches={self.stretches}: it must divide --epochs={values.epochs}."
            )
        each = self.workers * self.batch
        in_epoch = len(self.train[1]) // each
        if not in_epoch:
            raise flags.IllegalFlagValueError(
                f"flag --train_images={values.train_images}: a step of {self.workers} workers with "
                f"{self.batch} examples takes {each}."
            )
        self.steps = values.epochs * in_epoch
        orders = []
        for seed in range(self.seeds):
            rng = np.random.default_rng(seed)
            epochs = [
                rng.permutation(len(self.train[1]))[: in_epoch * each] for _ in range(values.epochs)
            ]
            orders.append(np.concatenate(epochs))
        shape = (self.seeds, self.stretches, -1, self.workers, self.batch)
        self.order = np.stack(orders).reshape(shape).astype(np.int32)
        self.model = models.MLP(found.classes, hidden)
        self.rate = optax.piecewise_constant_schedule(values.lr, {self.steps // 2: 0.1})

    def loss(self, params: Any, index: jax.Array, train: Any) -> jax.Array:
        """The mean cross entropy of the examples with these indices in the training set."""
        images, labels = (jnp.asarray(part)[index] for part in train)
        logits = self.model.apply(params, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def params(self) -> Any:
        """The initial parameters of all seeds."""
        image = jnp.asarray(self.train[0][:1])
        keys = jax.random.split(jax.random.key(0), self.seeds)
        return jax.jit(jax.vmap(lambda key: self.model.init(key, image, train=True)))(keys)

    def optimizer(self, rule: optax.GradientTransformation) -> Any:
        """The rule after the learning rate, as in the demo, on simulated workers."""
        chain = optax.chain(optax.scale_by_learning_rate(self.rate), rule)
        return ef.simulate(chain, self.workers, AXIS)

    def begin(self, rule: optax.GradientTransformation) -> Carry:
        """The start of all runs; its parameters are the same for every rule."""
        params = self.params()
        return Carry(params, jax.jit(jax.vmap(self.optimizer(rule).init))(params))

    def program(self, rule: optax.GradientTransformation, carry: Carry) -> Any:
        """A compiled program that trains all seeds for one stretch.

        The training set is an argument: a large constant takes minutes to compile.
        """
        tx = self.optimizer(rule)

        def one(params: Any, state: Any, index: jax.Array, train: Any) -> Any:
            def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
                params, state = carry
                gradients = jax.vmap(jax.grad(self.loss), (None, 0, None))(params, index, train)
                updates, state = tx.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), index)[0]

        of_all = jax.jit(jax.vmap(one, (0, 0, 0, None)))
        return of_all.lower(carry.params, carry.state, self.order[:, 0], self.train).compile()

    def stretch(self, program: Any, carry: Carry) -> tuple[Carry, float]:
        """Trains for one stretch; also returns the processor seconds for a step of one seed."""
        index, start = self.order[:, carry.stretch], time.process_time()
        params, state = jax.block_until_ready(program(carry.params, carry.state, index, self.train))
        seconds = (time.process_time() - start) / (index.shape[0] * index.shape[1])
        return Carry(params, state, carry.stretch + 1), seconds

    def rate_at(self, stretch: int) -> float:
        """The learning rate in the first step of a stretch."""
        return float(self.rate(stretch * self.steps // self.stretches))

    def example(self, carry: Carry) -> Any:
        """What a compressor of worker 0 gets next in the run of seed 0: its step and residual."""
        params = jax.tree.map(lambda x: x[0], carry.params)
        at = min(carry.stretch, self.stretches - 1)
        gradient = jax.grad(self.loss)(params, jnp.asarray(self.order[0, at, 0, 0]), self.train)
        rate = self.rate_at(carry.stretch)
        residual = jax.tree.map(lambda x: x[0, 0], carry.state[1].residual)
        return jax.tree.map(lambda g, e: e - rate * g, gradient, residual)

    def accuracy(self, carry: Carry) -> np.ndarray:
        """The accuracy of every seed on the test set, in per cent."""
        images, labels = self.test
        return 100 * np.mean(np.argmax(self._logits(carry, images), -1) == labels, axis=1)

    def training_loss(self, carry: Carry) -> np.ndarray:
        """The mean cross entropy of every seed on the whole training set."""
        images, labels = self.train
        logits = self._logits(carry, images)
        of_each = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(jnp.asarray(labels), logits.shape[:2])
        )
        return np.asarray(of_each.mean(1))

    def _logits(self, carry: Carry, images: np.ndarray) -> jax.Array:
        """(seeds, images, classes)."""
        apply = lambda p: self.model.apply(p, jnp.asarray(images), train=False)  # noqa: E731
        return jax.vmap(apply)(carry.params)


def _widths(words: list[str]) -> tuple[int, ...]:
    """The value of `--hidden`."""
    if any(not word.isdecimal() or not int(word) for word in words):
        raise flags.IllegalFlagValueError(
            f"flag --hidden={','.join(words)}: give the width of every hidden layer, as in 128,64."
        )
    return tuple(map(int, words))


def compared(ours: np.ndarray, other: np.ndarray, digits: int = 2) -> str:
    """The mean difference of two methods by seed, with its standard error."""
    gap = ours - other
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    return f"{gap.mean():+.{digits}f} ± {error:.{digits}f}"


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
