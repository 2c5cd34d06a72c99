"""What is compared: the planner's methods, each as a training step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import ef_optax as ef
from ef_optax.measure.planner import Method, methods
from experiments.transformer import SIZES, Transformer

AXIS = "workers"
RATE = 1e-3
"""Adam's learning rate where a run is timed, which no time depends on."""

LENGTH = 64
"""Tokens of a row."""

HELD_OUT = 32
"""Held-out rows of a loss by seconds, divided between the workers."""

TORCH = ("DDP", "DDP, float16", "DDP, PowerSGD")
"""PyTorch's own data parallelism: dense, with a hook that sends float16, and PowerSGD of rank 4."""

LOCAL = "compute, local steps"
"""A step of DiLoCo that is never followed by an exchange: what local steps compute."""

LATE = ", a step late"
"""The end of the name of a method whose updates travel while the next gradient is computed."""

ALSO_LATE = ("dense float32", "scaled_sign")

LEFT_OUT = ("DiLoCo, H = 100", "DiLoCo, H = 30, 4 bits")
"""Methods of the planner whose times follow from those of the others."""


@functools.cache
def chosen() -> dict[str, Method]:
    """The methods by name, dense ones first.

    A mean in bfloat16 travels by ``two_shot``, which moves the bytes of an all-reduce: XLA turns an
    all-reduce of bfloat16 into one of float32 on a CPU.
    """
    plain = {method.name: method for method in methods() if method.name not in LEFT_OUT}
    late = [dataclasses.replace(plain[name], name=name + LATE) for name in ALSO_LATE]
    return plain | {method.name: method for method in late}


def is_late(name: str) -> bool:
    """Whether the updates of a method of this name travel during the next gradient."""
    return name.endswith(LATE)


def sent(method: Method) -> Method:
    """The method with what it really sends here."""
    if method.dtype != "bfloat16":
        return method
    C = ef.exchanges.two_shot(ef.cast("bfloat16"))
    return dataclasses.replace(method, compressor=C, dtype="float32")


def adam(rate: float) -> optax.GradientTransformation:
    """Adam with its learning rate in its state, so that one program serves all rates."""
    fixed = ("b1", "b2", "eps", "eps_root", "nesterov")
    return optax.inject_hyperparams(optax.adam, static_args=fixed)(rate)


def optimizer(
    method: Method, mesh: Mesh, adam: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """A method with Adam: after the exchange, or as the inner optimizer of local steps.

    Only the exchange is lifted. With Adam inside of the lift, a step that is not finite would leave
    Adam as it was, but its new moments would have to wait in memory for the check of its updates,
    which takes longer than some codecs. Here Adam gets zeros in such a step.
    """
    adam = optax.adam(RATE) if adam is None else adam
    if method.name.startswith("DiLoCo"):
        return ef.data_parallel(ef.local.diloco(adam, method.period, axis_name=AXIS), mesh, AXIS)
    if method.name.startswith("SparseLoCo"):
        C = method.compressor  # its mean over the senders is part of it
        local = ef.local.sparse_loco(adam, method.period, C, mean="workers", axis_name=AXIS)
        return ef.data_parallel(local, mesh, AXIS)
    method = sent(method)
    rule = method.rule(method.compressor, axis_name=AXIS)
    return optax.chain(ef.data_parallel(rule, mesh, AXIS), adam)


def local_steps(mesh: Mesh) -> optax.GradientTransformationExtraArgs:
    """Local steps for ever."""
    diloco = ef.local.diloco(optax.adam(RATE), 1 << 30, axis_name=AXIS)
    return ef.data_parallel(diloco, mesh, AXIS)


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
