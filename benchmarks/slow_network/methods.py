"""What is compared: the planner's methods, each as a training step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax

import ef_optax as ef
from ef_optax.measure.planner import Method, methods
from experiments.transformer import SIZES, Transformer

AXIS = "workers"
RATE = 1e-3
"""Adam's learning rate where a run is timed, which no time depends on."""

LENGTH = 64
"""Tokens of a row."""

TORCH = ("DDP", "DDP, float16", "DDP, PowerSGD")
"""PyTorch's own data parallelism: dense, with a hook that sends float16, and PowerSGD of rank 4."""

LEFT_OUT = ("DiLoCo, H = 100", "DiLoCo, H = 30, 4 bits")
"""Methods of the planner whose times follow from those of the others."""


@functools.cache
def chosen() -> dict[str, Method]:
    """The methods by name, dense ones first.

    A mean in bfloat16 travels by ``two_shot``, which moves the bytes of an all-reduce: XLA turns an
    all-reduce of bfloat16 into one of float32 on a CPU.
    """
    return {method.name: method for method in methods() if method.name not in LEFT_OUT}


def sent(method: Method) -> Method:
    """The method with what it really sends here."""
    if method.dtype != "bfloat16":
        return method
    C = ef.exchanges.two_shot(ef.cast("bfloat16"))
    return dataclasses.replace(method, compressor=C, dtype="float32")


def optimizer(method: Method, rate: float = RATE) -> optax.GradientTransformation:
    """A method with Adam: after the exchange, or as the inner optimizer of local steps."""
    adam = optax.adam(rate)
    if method.name.startswith("DiLoCo"):
        return ef.local.diloco(adam, method.period, axis_name=AXIS)
    if method.name.startswith("SparseLoCo"):
        C = method.compressor  # its mean over the senders is part of it
        return ef.local.sparse_loco(adam, method.period, C, mean="workers", axis_name=AXIS)
    method = sent(method)
    return optax.chain(method.rule(method.compressor, axis_name=AXIS), adam)


def model(size: str, vocabulary: int) -> Transformer:
    """The language model."""
    return Transformer(vocabulary, SIZES[size])


def start(size: str, vocabulary: int, seed: int = 0) -> Any:
    """Its first parameters."""
    tokens = jax.numpy.zeros((1, LENGTH), int)
    return model(size, vocabulary).init(jax.random.key(seed), tokens)["params"]


def loss(size: str, vocabulary: int) -> Any:
    """``loss(params, tokens)``: mean cross entropy of the next token, (rows, LENGTH + 1)."""
    network = model(size, vocabulary)

    def mean(params: Any, tokens: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return mean
