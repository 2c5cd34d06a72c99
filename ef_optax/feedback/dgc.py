"""Deep Gradient Compression (Lin et al. 2018): momentum correction and factor masking.

heavy ball:  u = m u + g ;  v = v + u            Nesterov:  u = m (u + g) ;  v = v + u + g
send C(v), and clear what was sent:  v = v - sent ;  u = u (1 - mask) ;  emit mean sent
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    CONTRACTIVE,
    AxisName,
    Codec,
    Compressor,
    ExchangeState,
    Identity,
    MemoryLike,
    as_transformation,
    check,
    collectives,
    exchange_for,
    for_leaf,
    like_of,
    memory_for,
    path_string,
    trees,
)


class DGCState(NamedTuple):
    """State of :func:`dgc`."""

    momentum: Any  # per worker, like the parameters: u
    residual: Any  # per worker, like the parameters: v, the velocity that is not yet sent
    exchange: ExchangeState


def dgc(
    compressor: Compressor,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    masking: bool = True,
    clip_norm: float | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DGC: the *velocity* is accumulated and sparsified, so that delayed entries keep momentum.

    .. math:: u' = m u + g, \quad v' = v + u', \quad c = C(v'), \quad v'' = v' - c, \quad
              u'' = u' \odot [\text{not sent}], \quad \text{emit mean}_i\,c_i

    The momentum is inside, so put plain ``optax.sgd(lr)`` after it. The sum of all c plus v is the
    sum of all velocity increments. Leaves whose compressor is ``ef.identity()`` (small ones, by
    ``ef.per_leaf``) have plain local momentum, as in the official code. For a ratio that changes
    with the step use :func:`scheduled`, and for the published warm-up :func:`dgc_warmup`.

    Args:
      compressor: a sparsifier such as ``ef.top_k(0.001)``, or
        ``ef.policies.dgc_warmup(0.001, steps)``, or ``ef.per_leaf`` with dense small leaves.
      momentum: m in [0, 1); 0 is :func:`error_feedback` in gradient units.
      nesterov: whether to use ``u = m (u + g)``, ``v = v + u + g``.
      masking: whether to clear the momentum of sent entries (momentum factor masking).
      clip_norm: the threshold for the norm of the *mean* gradient: every worker first clips its own
        gradient to ``clip_norm/sqrt(n)``. None for no clipping.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which momentum and residual are stored, as in :func:`error_feedback`.

    Returns:
      The transformation; its state is a :class:`DGCState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a momentum outside [0, 1) or
        a threshold that is not positive; at init, for a compressor that makes the memory of a leaf
        grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.dgc(ef.top_k(k=1), momentum=0.5)
      >>> _, state = tx.update(jnp.array([3.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> tx.update(jnp.array([1.0, 1.0]), state)[0].tolist()  # 2 + (0.5 * 2 + 1)
      [0.0, 4.0]

    References:
      Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018; details as in
      the official code, synxlin/deep-gradient-compression.
    """
    check.decay("dgc", "momentum", momentum)
    check.flag("dgc", "nesterov", nesterov)
    check.flag("dgc", "masking", masking)
    if clip_norm is not None:
        check.positive("dgc", "clip_norm", clip_norm)
    exchange = exchange_for("dgc", compressor, axis_name, needs=(CONTRACTIVE,))
    memory = memory_for(memory, axis_name)

    def clip(g: Any) -> Any:
        if clip_norm is None:
            return g
        threshold = clip_norm / math.sqrt(collectives.axis_size(axis_name))
        norm = jnp.sqrt(trees.squared_norm(g))
        return trees.scale(jnp.where(norm > threshold, threshold / norm, 1), g)

    def init_fn(params: Any) -> DGCState:
        u, v = memory.zeros(params), memory.zeros(params)
        return DGCState(momentum=u, residual=v, exchange=exchange.init(memory.read(v)))

    def update_fn(
        updates: Any, state: DGCState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DGCState]:
        del params, extra_args
        g = clip(trees.wide(updates))
        u, v = memory.read((state.momentum, state.residual))
        if nesterov:
            u = trees.scale(momentum, trees.add(u, g))
            v = trees.add(trees.add(v, u), g)
        else:
            u = trees.axpy(momentum, u, g)
            v = trees.add(v, u)
        out = exchange(v, state.exchange, want=("residual", "support"))
        if masking:
            masked = jax.tree.map(lambda x, mask: jnp.where(mask, 0, x), u, out.support)
            kept = _dense_leaves(exchange.codec, u)
            u = jax.tree.map(lambda x, y, dense: x if dense else y, u, masked, kept)
        after = DGCState(
            momentum=memory.write(u, state.momentum, out.state.step),
            residual=memory.write(out.residual, state.residual, out.state.step),
            exchange=out.state,
        )
        return trees.emit(out.aggregate, updates), after

    return as_transformation(init_fn, update_fn)


def _dense_leaves(codec: Codec, tree: Any) -> Any:
    """Which leaves are sent dense; the momentum of these is never masked."""

    def dense(path: Any, x: Any) -> bool:
        return isinstance(for_leaf(codec, path_string(path), like_of(x)), Identity)

    return jax.tree_util.tree_map_with_path(dense, tree)
