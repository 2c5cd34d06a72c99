"""The methods that a plan compares: what is sent, how it travels, and what is remembered."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ef_optax._core.codec import Codec
from ef_optax._core.policy import for_leaf, for_workers, stages_of
from ef_optax._core.requests import AllToAll, Gather, Gathered, Permute
from ef_optax._core.workers import Workers
from ef_optax._exchange.rounds import HEADER_WORDS
from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank.power_sgd import power_sgd
from ef_optax.compressors.quantize.block_quantize import block_quantize
from ef_optax.compressors.quantize.scaled_sign import scaled_sign
from ef_optax.compressors.quantize.sigma_bins import sigma_bins
from ef_optax.compressors.sparse.arc_top_k import arc_top_k
from ef_optax.compressors.sparse.block_top_k import block_top_k
from ef_optax.exchanges.senders import mean_of_senders
from ef_optax.exchanges.two_shot import two_shot
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.local.diloco import diloco
from ef_optax.local.sparse_loco import sparse_loco
from ef_optax.measure.planner.cost import Kind, Round
from ef_optax.measure.planner.shapes import Leaf

Rule = Callable[..., optax.GradientTransformation]

AXIS = "workers"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to exchange gradients, or the drifts of local steps.

    Attributes:
      name: its name in a plan.
      compressor: what is sent, with its transport.
      rule: ``rule(compressor, axis_name=...)``, whose state is what a device must hold.
      period: steps between two exchanges.
      dtype: the dtype of values that are sent as they are.
    """

    name: str
    compressor: Compressor
    rule: Rule = dataclasses.field(default_factory=lambda: error_feedback)
    period: int = 1
    dtype: str = "float32"

    @property
    def dense(self) -> bool:
        """Whether it is plain data parallelism, with which the others are compared."""
        return self.rule is compressed_mean and self.period == 1


def _diloco(period: int) -> Rule:
    return lambda C, **axis: diloco(optax.identity(), period, compressor=C, **axis)


def _drift_mean(period: int) -> Rule:
    return lambda C, **axis: diloco(optax.identity(), period, **axis)


def _sparse_loco(period: int) -> Rule:
    return lambda C, **axis: sparse_loco(optax.identity(), period, C, mean="workers", **axis)


@functools.cache
def methods() -> tuple[Method, ...]:
    """The methods of a plan unless others are given.

    Returns:
      Dense in two dtypes, which must be among them, and a choice of compressors, transports and
      local steps; the same objects at every call.

    Example:
      >>> [method.name for method in methods() if method.period == 30]
      ['DiLoCo, H = 30', 'DiLoCo, H = 30, 4 bits', 'SparseLoCo, H = 30']
    """
    two_bits = compose(sigma_bins(2), block_top_k(k=64, block=4096))
    return (
        Method("dense float32", identity(), compressed_mean),
        Method("dense bfloat16", identity(), compressed_mean, dtype="bfloat16"),
        Method("scaled_sign", scaled_sign()),
        Method("scaled_sign, two_shot", two_shot(scaled_sign())),
        Method("4 bits, two_shot", two_shot(block_quantize(4))),
        Method("block_top_k 1%", block_top_k(0.01)),
        Method("block_top_k 1%, 2 bits", compose(sigma_bins(2), block_top_k(0.01))),
        Method("arc_top_k 1%", arc_top_k(0.01)),
        Method("power_sgd(4)", power_sgd(4)),
        Method("DiLoCo, H = 30", identity(), _drift_mean(30), period=30),
        Method("DiLoCo, H = 100", identity(), _drift_mean(100), period=100),
        Method("DiLoCo, H = 30, 4 bits", two_shot(block_quantize(4)), _diloco(30), period=30),
        Method("SparseLoCo, H = 30", mean_of_senders(two_bits), _sparse_loco(30), period=30),
    )


@functools.cache
def rounds_of(method: Method, leaves: tuple[Leaf, ...], workers: int) -> tuple[Round, ...]:
    """The rounds of one exchange of a model, with the exact bytes that one worker contributes.

    The bits are those that the codec declares, and tests hold them to compiled programs. Kinds are
    found by running the codec's protocol on shapes, without devices.

    Args:
      method: what is sent, and how.
      leaves: the leaves of the model.
      workers: n.

    Example:
      >>> from ef_optax.measure.planner.shapes import leaves_of
      >>> rounds_of(methods()[2], leaves_of({"w": jnp.zeros((64, 64))}), 4)
      (Round(kind='gather', message_bytes=524),)
    """
    bits: dict[tuple[int, Kind], int] = {}
    known: dict[int, tuple[Kind, ...]] = {}
    dtype = jnp.dtype(method.dtype)
    for leaf in leaves:
        like = jax.ShapeDtypeStruct(leaf.shape, dtype)
        own = for_leaf(method.compressor.codec, leaf.path, like)
        codec = _settled(for_workers(own, like, workers))
        if id(codec) not in known:
            known[id(codec)] = tuple(_kinds(codec, workers))
        traffic = codec.traffic(leaf.shape, dtype, workers)
        # A leaf that is sent dense, in a single round, travels with the first round of the others.
        for number, own in enumerate(traffic):
            key = number, known[id(codec)][number]
            bits[key] = bits.get(key, 0) + own * leaf.times
    rounds = [_in_words(kind, total, workers) for (_, kind), total in sorted(bits.items())]
    header = 4 * (HEADER_WORDS if any(one.kind == "gather" for one in rounds) else 1)
    at = next((i for i, one in enumerate(rounds) if one.kind in ("gather", "reduce")), 0)
    first = dataclasses.replace(rounds[at], message_bytes=rounds[at].message_bytes + header)
    return (*rounds[:at], first, *rounds[at + 1 :])


def _in_words(kind: Kind, bits: int, workers: int) -> Round:
    """A round of whole words; of an all-to-all each row has whole words."""
    rows = workers if kind == "all_to_all" else 1
    return Round(kind, 4 * rows * math.ceil(bits / (32 * rows)))


def _settled(codec: Codec) -> Codec:
    """The codec that is used in the long run, if it changes with the step."""
    return stages_of(codec).stages[-1].codec


def _kinds(codec: Codec, workers: int) -> Iterator[Kind]:
    """The kind of each round of a codec's protocol, which runs on the shape of one matrix."""
    like = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    group = codec.granularity == "group"
    kinds: list[Kind] = []

    def run(x: Any) -> Any:
        state = codec.init(like, "leaf", workers)
        step, index = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        own = Workers(workers, index, step, np.uint32(0))
        protocol = codec.protocol([x] if group else x, [state] if group else state, own)
        answer: Any = None
        while True:
            try:
                request = protocol.send(answer)
            except StopIteration as stop:
                return stop.value.aggregate
            kinds.append(_kind(request))
            answer = _answer(request, workers)

    jax.eval_shape(run, like)
    return iter(kinds)


def _kind(request: Any) -> Kind:
    named: dict[type, Kind] = {Gather: "gather", AllToAll: "all_to_all", Permute: "permute"}
    return named.get(type(request), "reduce")


def _answer(request: Any, workers: int) -> Any:
    """What a round gives if all workers contribute the same."""
    if isinstance(request, Gather):
        copies = lambda x: jnp.broadcast_to(x, (workers, *x.shape))  # noqa: E731
        return Gathered(jax.tree.map(copies, request.message), None, workers)
    if isinstance(request, AllToAll):
        return Gathered(request.message, None, workers)
    return request.message if isinstance(request, Permute) else request.value


@functools.cache
def state_bytes(method: Method, leaves: tuple[Leaf, ...], workers: int) -> int:
    """Bytes of the state that a worker holds because of the method: residuals, drifts, momenta.

    The state of the optimizer that does the (local) steps is not part of it.

    Args:
      method: what is sent, and how.
      leaves: the leaves of the model.
      workers: n.

    Example:
      >>> from ef_optax.measure.planner.shapes import leaves_of
      >>> state_bytes(methods()[2], leaves_of(1e6), workers=4)
      4000000
    """
    rule, total = method.rule(method.compressor, axis_name=AXIS), 0
    for leaf in leaves:
        like = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)}
        every = jax.vmap(lambda _, like=like: rule.init(_zeros(like)), axis_name=AXIS)
        state = jax.eval_shape(every, jax.ShapeDtypeStruct((workers,), jnp.float32))
        arrays = [x for x in jax.tree.leaves(state) if x.ndim > 1]
        total += leaf.times * sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in arrays)
    return total


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
