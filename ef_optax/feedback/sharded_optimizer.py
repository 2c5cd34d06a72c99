"""An optimizer that is split over the workers: ZeRO, with both directions compressed.

p_i = g_i + a e_i                        worker i's gradient and residual, of the whole model
row j of C(p_i)  ->  worker j            all_to_all: a reduce-scatter of compressed rows
e_i = g_i + e_i - C(p_i)
G_j = mean_i C(p_i)_j
x_j = x_j + Optimizer(G_j, x_j)          on the shard that worker j owns, in float32
w   = w + C_w(x_j - w_j) of every j      all_gather of compressed differences; gradients at w
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.exchanges.carried import carried
from ef_optax.extend import (
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    GatherShards,
    MemoryLike,
    ReduceScatter,
    arguments,
    as_transformation,
    check,
    exchange_for,
    owned,
    rounded,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback


class ShardedOptimizerState(NamedTuple):
    """State of :func:`sharded_optimizer`."""

    gradients: Any  # an ErrorFeedbackState; its residual is per worker, like the parameters: e_i
    inner: Any  # per worker: the state of the optimizer, for the worker's shards
    behind: Any  # per worker, float32 (shard,): x_j - w_j, how far the common weights are behind
    weights: ExchangeState

    roles = {"inner": "shards", "behind": "shards"}


def sharded_optimizer(
    inner: optax.GradientTransformation,
    gradients: Compressor,
    weights: Compressor | None = None,
    *,
    axis_name: AxisName = None,
    injection: float = 1.0,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Every worker does the optimizer's step on its own shard of the parameters.

    .. math:: G_j = \text{mean}_i\,C(g_i + a e_i)_j, \quad e_i' = g_i + e_i - C(g_i + a e_i), \quad
              x_j' = x_j + \text{Optimizer}(G_j), \quad w' = w + C_w(x_j' - w_j)_{j = 1, \dots, n}

    Gradients are reduced and scattered as compressed rows, so that each worker receives the mean of
    its shard only. The step is added to the worker's shard x_j of the exact parameters, and the
    parameters w of the training loop, at which gradients are taken, follow by compressed
    differences. Both directions cost 2 (n - 1)/n messages on the link, for any number of workers.

    The optimizer's state and x are held once by all workers together: with Adam, 12/n bytes a
    parameter instead of 8. What all workers hold whole is w, in the parameters' own dtype
    (differences need something to be added to), and their own residual e, of about one byte with
    ``memory=block_quantize(8)``. x is kept as x - w in float32, so bfloat16 parameters lose
    nothing: rounding in ``optax.apply_updates`` is made up for in the next step.

    With ``weights=None`` it is the optimizer after :func:`error_feedback` of the rows, and w = x.
    With exact gradients it is :func:`ef21_p` after the optimizer.

    Args:
      inner: the optimizer with its rate and sign, such as ``optax.adamw(3e-4)``. It sees flat
        shards, so it must work entry by entry (Adam, SGD, Lion; weight decay too). A norm would be
        that of a shard; matrices are not seen.
      gradients: C, for each row; stateless, such as ``block_quantize(4, block=128)``.
      weights: C_w, for each shard, such as ``block_quantize(8, block=2048)``; None sends float32.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      injection: a, as in :func:`error_feedback`.
      memory: how e is stored, as in :func:`error_feedback`.

    Returns:
      The optimizer, which needs no other transformation after it; its state is a
      :class:`ShardedOptimizerState`. Gradients of a worker may be clipped before it.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation, or a compressor is not a stateless
        Compressor of single leaves. ValueError: for a bad injection; at init, for parameters that
        are split over model axes, or a compressor that makes a memory grow.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.sharded_optimizer(
      ...     optax.sgd(1.0), ef.identity(), ef.top_k(k=1), axis_name="data")
      >>> tx = ef.simulate(tx, 2, "data")
      >>> params = jnp.zeros(4)
      >>> state = tx.init(params)
      >>> grads = jnp.array([[2.0, 1.0, 0.0, 1.0], [2.0, 3.0, 4.0, 1.0]])
      >>> updates, state = tx.update(grads, state, params)
      >>> updates.tolist()  # the largest step of each worker's shard
      [-2.0, 0.0, -2.0, 0.0]
      >>> state.behind.tolist()  # what the others do not know yet
      [[0.0, -2.0], [0.0, -1.0]]

    References:
      Rajbhandari et al., "ZeRO", SC 2020; Xie et al., "LoCo", 2024 (the gradients); Jia et al.,
      "SDP4Bit", NeurIPS 2024 (the weights).
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"sharded_optimizer: inner={inner!r} is not an Optax transformation.")
    check.finite("sharded_optimizer", "injection", injection)
    inner = optax.with_extra_args_support(inner)
    rows = carried("sharded_optimizer: gradients,", gradients, ReduceScatter())
    feedback = error_feedback(rows, axis_name=axis_name, injection=injection, memory=memory)
    differences = identity() if weights is None else weights
    exchange = exchange_for(
        "sharded_optimizer",
        carried("sharded_optimizer: weights,", differences, GatherShards()),
        axis_name,
        argument="weights",
        needs=(CONTRACTIVE,),
    )

    def init_fn(params: Any) -> ShardedOptimizerState:
        owned.require_unsplit("sharded_optimizer", params)
        x = trees.wide(owned.shards(params, axis_name))
        behind = jax.tree.map(jnp.zeros_like, x)
        return ShardedOptimizerState(
            feedback.init(params), inner.init(x), behind, exchange.init(behind)
        )

    def update_fn(
        updates: Any, state: ShardedOptimizerState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ShardedOptimizerState]:
        params = arguments.require_params("sharded_optimizer", params)
        G, kept = feedback.update(trees.wide(updates), state.gradients)
        w = owned.shards(params, axis_name)
        x = trees.add(state.behind, w)
        step, after = inner.update(G, state.inner, x, **extra_args)
        ahead = owned.without_padding(trees.add(state.behind, step), params, axis_name)
        out = exchange(ahead, state.weights, want=("sent",))
        emitted = jax.tree.map(_narrowed, owned.whole(out.aggregate, params), updates)
        own = jax.tree.map(_applied, out.sent, w, updates)
        return emitted, ShardedOptimizerState(kept, after, trees.sub(ahead, own), out.state)

    return as_transformation(init_fn, update_fn)


def _narrowed(x: Any, like: Any) -> Any:
    """The value in the dtype of ``like``, rounded even if the compiler would keep it wide."""
    return x if x.dtype == like.dtype else rounded(x, like.dtype)


def _applied(sent: Any, w: Any, update: Any) -> Any:
    """How far this update moves w, after both were rounded, in the dtype of ``sent``."""
    if w.dtype == update.dtype == sent.dtype:
        return sent
    before = w.astype(sent.dtype)
    after = before + _narrowed(sent, update).astype(sent.dtype)
    return _narrowed(after, w).astype(sent.dtype) - before
