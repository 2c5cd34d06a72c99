"""AQ-SGD: activations as differences from what was sent of the same example before.

    m(s): what both ends of the cut have of example s
    first visit of s    send a              m(s) = a
    later               send D = Q(a - m(s))    m(s) = m(s) + D
    the receiver        goes on with m(s)
    backward            the gradient with respect to m(s), compressed without a memory

As training converges, an example's activations change less and less, and so does the error of Q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._exchange import collectives as coll
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import GOLDEN
from ef_optax._numeric.trees import wide
from ef_optax._rules.memory import Memory, MemoryLike, memory_for
from ef_optax.activations import _cut
from ef_optax.compressors.compressor import Compressor


class AQSGDState(NamedTuple):
    """State of :func:`aq_sgd` on one stage."""

    step: Array  # int32 scalar: batches sent
    seen: Array  # (num_examples,) bool: whether this stage has sent the example
    memory: Any  # m(s) in stored form: num_examples rows, or twice as many if a stage between
    # two others needs one half for what it sends, and the other for what it receives


class AQSGD(NamedTuple):
    """The two functions of a cut with a memory; see :func:`aq_sgd`."""

    init: Callable[[Any], AQSGDState]  # (x or its shape and dtype) -> state
    apply: Callable[..., tuple[Array, AQSGDState]]  # (x, state, index) -> (y, state)


def aq_sgd(
    forward: Compressor,
    backward: Compressor | None = None,
    *,
    num_examples: int,
    memory: MemoryLike = None,
    axis_name: coll.AxisName = None,
    pairs: _cut.Pairs | None = None,
) -> AQSGD:
    """A cut that sends the difference from the example's activations of the last epoch.

    Both ends remember ``m(s)`` for every training example s. Where all examples of a batch have
    been sent before, ``Q(a - m(s))`` crosses and both ends add it to m(s), which the receiver goes
    on with; else the whole batch crosses dense. The example's number travels too, 32 bits each, so
    both ends change the same row. Examples whose values are not finite are not remembered.

    This is a difference scheme like EF21, by example. It assumes that examples return: augmentation
    that changes their activations, or a single epoch, leaves nothing to gain. In a later study
    (Rudakov et al.) anything sparser than top-k of 0.3 hurt with such a memory. Examples that were
    never sent (validation) cross by :func:`compress_activations` or dense.

    Args:
      forward: the compressor Q of differences, for each example by itself.
      backward: the compressor of gradients; None sends them as they are.
      num_examples: number of training examples N.
      memory: how m(s) is stored: a dtype such as ``"bfloat16"``, a compressor such as
        ``ef.block_quantize(4)``, or None for float32. What storing loses is part of the next
        difference. N times the size of an example's activations is needed on each end.
      axis_name: the axis of the surrounding ``jax.shard_map`` along which the stages are; None for
        a model in one process.
      pairs: (sender, receiver) of each link; None for each stage to the next.

    Returns:
      ``init(x) -> state``, for a batch ``x`` or its shape and dtype, and ``apply(x, state, index)
      -> (y, state)``. ``index`` has the number of each example, int of shape (batch,), all
      different; -1 marks padding, and no number outside of [0, N) is remembered. Over a mesh axis
      each stage has its own state, so call ``init`` inside the map too.

    Raises:
      ValueError: for a compressor with its own protocol or with state, or a bad option.
      TypeError: if ``forward`` or ``backward`` is no compressor, or ``x`` is not floating-point.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> cut = ef.activations.aq_sgd(ef.block_quantize(2), num_examples=10)
      >>> x, index, apply = jnp.array([[4.0, 1.0]]), jnp.array([7]), jax.jit(cut.apply)
      >>> y, state = apply(x, cut.init(x), index)
      >>> y.tolist()  # the first visit is dense
      [[4.0, 1.0]]
      >>> y, state = apply(x + jnp.array([0.5, 0.1]), state, index)
      >>> y.tolist()  # the difference is rounded to -0.5, 0 and 0.5
      [[4.5, 1.0]]

    References:
      Wang, Yuan, Rimanic, He, Dao, Chen, Ré, Zhang, Fine-tuning language models over slow networks
      using activation compression with guarantees, 2022, Algorithm 1. Rudakov et al., Activations
      and gradients compression for model-parallel training, 2024.
    """
    cut = _cut.cut_for("aq_sgd", axis_name, pairs)
    check.count(cut.name, "num_examples", num_examples)
    there = _cut.codec_for(cut.name, "forward", forward)
    back = _cut.codec_for(cut.name, "backward", backward)
    kept, sent_back = memory_for(memory), cut.gradient_path(back)

    def init_fn(x: Any) -> AQSGDState:
        rows = num_examples * (2 if cut.relays() else 1)
        one = kept.zeros(jnp.zeros(jnp.shape(x)[1:], jnp.result_type(x)))
        stacked = jax.tree.map(lambda row: jnp.broadcast_to(row, (rows, *row.shape)), one)
        state = AQSGDState(jnp.zeros((), jnp.int32), jnp.zeros(num_examples, bool), stacked)
        return jax.tree.map(lambda field: coll.to_varying(jnp.array(field), axis_name), state)

    def apply_fn(x: Any, state: AQSGDState, index: Any) -> tuple[Array, AQSGDState]:
        x = cut.batch(x)
        index = _checked_index(index, x.shape[0], axis_name)
        known = (index >= 0) & (index < num_examples) & cut.sends()
        own = jnp.where(known, index, -1)
        a = wide(jax.lax.stop_gradient(x))

        def at(slots: Array) -> Any:
            return jax.tree.map(lambda field: field[jnp.maximum(slots, 0)], state.memory)

        def dense() -> tuple[Array, Array]:
            message, slots = _both_ends(cut, jax.lax.stop_gradient(x), own, num_examples)
            return wide(message), slots

        def difference() -> tuple[Array, Array]:
            D = cut.encode(there, a - Memory.read(at(own)), state.step, _cut.FORWARD)
            D, slots = _both_ends(cut, D, own, num_examples)
            return Memory.read(at(slots)) + _cut.decode(there, D, a), slots

        new = coll.anywhere(jnp.any(known & ~state.seen[own]), axis_name)
        m, slots = coll.agreed_cond(new, dense, difference, axis=axis_name)
        slots = jnp.where(_finite(m), slots, -1)
        # Each example's noise is its own, and the same on both ends.
        steps = state.step + slots % num_examples * np.int32(GOLDEN - 2**32)
        write = jax.vmap(lambda *row: kept.write(*row, shared=True))
        rows = write(m, at(slots), steps)
        memory = jax.tree.map(lambda old, new: _changed(old, slots, new), state.memory, rows)
        seen = _changed(state.seen, jnp.where(_finite(a), own, -1), True)
        y = jnp.where(cut.receives(), m[-x.shape[0] :], 0).astype(x.dtype)
        return sent_back(x, y, state.step), AQSGDState(state.step + 1, seen, memory)

    return AQSGD(init_fn, apply_fn)


def _both_ends(cut: _cut.Cut, message: Any, own: Array, num_examples: int) -> tuple[Any, Array]:
    """What this stage has of its links: the messages, and the rows of the memory they change.

    That is the message that it sent or the one that it received; for a stage between two others,
    the first and then the second. Both ends of a link then run the same operations on the same
    numbers, and keep the same memory to the bit.
    """
    arrived, slots = cut.forward((message, own))
    here = cut.receives()
    second_half = num_examples if cut.relays() else 0
    slots = jnp.where(here & (slots >= 0), slots + second_half, -1)
    if cut.relays():
        return jax.tree.map(lambda *ends: jnp.concatenate(ends), (message, own), (arrived, slots))
    return jax.tree.map(lambda x, y: jnp.where(here, y, x), (message, own), (arrived, slots))


def _changed(field: Array, slots: Array, rows: Any) -> Array:
    """An array with new rows; a slot of -1 changes none."""
    return field.at[jnp.where(slots < 0, len(field), slots)].set(rows, mode="drop")


def _finite(values: Array) -> Array:
    """Which examples have only finite values."""
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def _checked_index(index: Any, batch: int, axis: coll.AxisName) -> Array:
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer) or index.shape != (batch,):
        raise ValueError(
            f"aq_sgd: index of shape {index.shape} and dtype {index.dtype} must be the whole "
            f"numbers of the {batch} examples of the batch."
        )
    return coll.to_varying(index.astype(jnp.int32), axis)
