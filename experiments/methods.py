"""The methods that the main job compares: short names, and any expression of public names."""

from __future__ import annotations

import functools

import optax
from absl import flags

import ef_optax as ef
from ef_optax.measure.planner.named import period_of
from experiments import expressions
from experiments.workers import AXIS

METHODS = ("sgdm", "signsgd", "signsgdm", "ef_signsgd", "top_k", "ef_top_k")
"""The short names, whose learning rate --lr gives."""

flags.DEFINE_float("ratio", 0.01, "Top-k keeps this part of each tensor.")
flags.DEFINE_float("momentum", 0.9, "Momentum of sgdm and signsgdm; the others have none.")
flags.DEFINE_float("weight_decay", 5e-4, "Added to the gradient before compression.")
FLAGS = flags.FLAGS


def optimizer(method: str) -> optax.GradientTransformationExtraArgs:
    """The transformation of one worker.

    An expression is the whole optimizer with its own rates; the rate of the main job, which begins
    at 1, multiplies its updates.
    """
    if method in METHODS:
        return optax.chain(*_short(method))
    factor = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return optax.chain(ef.parse(method).build(AXIS), factor(learning_rate=1.0))


def _short(method: str) -> tuple[optax.GradientTransformation, ...]:
    """What the short names mean. The order of the lines of a chain defines the method.

    Weight decay comes first in all of them, as in the code of Karimireddy et al. (2019), so it is
    compressed too. Error feedback comes after the learning rate, so the memory is in units
    of steps (their Algorithm 1). The rate is a state variable, so a new rate needs no compilation.
    """
    decay = optax.add_decayed_weights(FLAGS.weight_decay)
    momentum = optax.trace(FLAGS.momentum)
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0)
    top_k = ef.top_k(FLAGS.ratio)
    mean = functools.partial(ef.compressed_mean, axis_name=AXIS)
    memory = functools.partial(ef.error_feedback, axis_name=AXIS)
    chains = {
        "sgdm": (decay, mean(ef.identity()), momentum, rate),
        # What the paper calls signSGD: the scaled sign without memory.
        "signsgd": (decay, mean(ef.scaled_sign()), rate),
        # Plain signs of each worker's own momentum; the step is rate x mean sign.
        "signsgdm": (decay, momentum, mean(ef.sign()), rate),
        "ef_signsgd": (decay, rate, memory(ef.scaled_sign())),
        "top_k": (decay, mean(top_k), rate),
        "ef_top_k": (decay, rate, memory(top_k)),
    }
    return chains[method]


def compressor(method: str) -> ef.Compressor:
    """What `method` would send: the size of a message if nothing is sent (one worker)."""
    if method not in METHODS:
        return expressions.compressor(ef.parse(method))
    if method == "sgdm":
        return ef.identity()
    if method in ("signsgd", "ef_signsgd"):
        return ef.scaled_sign()
    return ef.sign() if method == "signsgdm" else ef.top_k(FLAGS.ratio)


def check(method: str) -> None:
    """Refuses an expression that cannot be an optimizer, before anything is computed.

    Raises:
      UsageError: with the remedy.
    """
    if method not in METHODS:
        expressions.check(ef.parse(method))


def period(method: str) -> int:
    """Steps between two exchanges of local steps, else 1."""
    return 1 if method in METHODS else period_of(ef.parse(method))
