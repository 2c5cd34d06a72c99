"""MicroAdam (Modoranu et al. 2024): Adam from a window of sparse gradients, with 4-bit feedback.

a = g + e ;  (I, V) = top-k of each block of a ;  a_I = 0 ;  e = a in 4 bits
the last W pairs (I, V) give m and v, weighted as in Adam
x = x - lr (m^/(sqrt(v^) + eps) + w x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.combine.compose import compose
from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.quantize.cast import cast
from ef_optax.compressors.quantize.uniform import uniform
from ef_optax.compressors.sparse.block_top_k import block_top_k
from ef_optax.extend import (
    Array,
    AxisName,
    MemoryLike,
    SparseCodec,
    as_transformation,
    check,
    codec_of,
    size_of,
    trees,
)
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback


class MicroAdamState(NamedTuple):
    """State of the window inside :func:`micro_adam`; the same on all workers."""

    window: Any  # for each leaf: the last W messages, each array with a leading axis W
    feedback: Any  # an ErrorFeedbackState, whose residual is in 4 bits


def micro_adam(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 0.01,
    *,
    window: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    block: int = 4096,
    narrow: bool = True,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MicroAdam: the moments are recomputed from the last W sparse gradients, and never stored.

    .. math:: a = g + e, \quad V = a_I, \quad e' = Q_4(a - V), \quad
              m = \tfrac{1 - b_1}{1 - b_1^t} \sum_{s > t - W} b_1^{t - s}\,V_s, \quad
              v = \tfrac{1 - b_2}{1 - b_2^t} \sum_{s > t - W} b_2^{t - s}\,V_s^2

    I are the largest entries of each block. A step changes only what is in the window, at most
    W k values, besides the weight decay. All leaves are treated alike.

    It saves memory on one worker too. The gradients are averaged dense, and everything else is the
    same on all workers; to compress the exchange, put a rule before the recipe and give it no axis.

    The bias correction with the number of steps, and the default blocks of the residual, are taken
    from accounts of the paper by others (unverified). The official code's option to add a part of
    the residual to the step is not part of it.

    Args:
      learning_rate: eta, a number or a schedule.
      ratio: k / block length, in (0, 1].
      window: W, the number of sparse gradients that are kept.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, decoupled.
      block: length of the blocks of the selection; in the official code the shared memory of the
        GPU decides.
      narrow: whether the window has its values in bfloat16, as in the official code.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how e is stored; None is ``ef.uniform(4, bucket=64)``: 4 bits between the smallest and
        the largest value of each block of 64.

    Returns:
      The optimizer. Memory for each parameter: 0.5 bytes and two words in 64 for e, and
      3.5 W ratio bytes for the window. Bits: 32 for each value.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.micro_adam(0.5, 0.5)
      >>> params = jnp.zeros(2)
      >>> updates, state = jax.jit(tx.update)(jnp.array([4.0, 1.0]), tx.init(params), params)
      >>> abs(updates).tolist()  # the 1 waits in the residual
      [0.5, 0.0]

    References:
      Modoranu et al., "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and
      Provable Convergence", NeurIPS 2024; IST-DASLab/ISTA-DASLab-Optimizers, micro_adam.py.
    """
    check.rate("micro_adam", "learning_rate", learning_rate)
    check.ratio("micro_adam", "ratio", ratio)
    check.count("micro_adam", "window", window)
    check.decay("micro_adam", "b1", b1)
    check.decay("micro_adam", "b2", b2)
    check.positive("micro_adam", "eps", eps)
    check.not_negative("micro_adam", "weight_decay", weight_decay)
    check.count("micro_adam", "block", block)
    check.flag("micro_adam", "narrow", narrow)
    largest = block_top_k(ratio, block=block)
    memory = uniform(4, bucket=64) if memory is None else memory
    rule = error_feedback(largest, memory=memory)
    pair = codec_of(compose(cast("bfloat16"), largest) if narrow else largest)
    assert isinstance(pair, SparseCodec)

    def init_fn(params: Any) -> MicroAdamState:
        def zeros(x: Array) -> Any:
            message = jax.jit(pair.encode)(jnp.zeros(jnp.shape(x), trees.widest(x)))
            return jax.tree.map(lambda field: jnp.stack([field] * window), message)

        return MicroAdamState(jax.tree.map(zeros, params), rule.init(params))

    def update_fn(
        updates: Any, state: MicroAdamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MicroAdamState]:
        del params, extra_args
        feedback: Any = state.feedback
        t = feedback.exchange.step
        largest, after = rule.update(trees.wide(updates), feedback)
        age = (t - jnp.arange(window, dtype=t.dtype)) % window

        def one(x: Array, messages: Any) -> tuple[Array, Any]:
            put = lambda old, new: old.at[t % window].set(new)  # noqa: E731
            messages = jax.tree.map(put, messages, pair.encode(x))
            like = jax.ShapeDtypeStruct(x.shape, x.dtype)
            indices, values = jax.vmap(lambda message: pair.parts(message, like))(messages)

            def moment(b: Any, values: Array) -> Array:
                b = jnp.asarray(b, x.dtype)
                weights = jnp.where(age <= t, b ** age.astype(x.dtype), 0)
                weights = (1 - b) / (1 - b ** (t + 1).astype(x.dtype)) * weights
                zeros = jnp.zeros(size_of(x.shape), x.dtype)
                parts = weights[:, None] * values.astype(x.dtype)
                return zeros.at[indices].add(parts).reshape(x.shape)

            m, v = moment(b1, values), moment(b2, jnp.square(values.astype(x.dtype)))
            return m / (jnp.sqrt(v) + eps), messages

        if not jax.tree.leaves(updates):
            return updates, MicroAdamState(state.window, after)
        step, messages = trees.map_several(one, largest, state.window)
        return trees.emit(step, updates), MicroAdamState(messages, after)

    return optax.chain(
        compressed_mean(identity(), axis_name=axis_name),
        as_transformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
