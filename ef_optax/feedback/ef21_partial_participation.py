"""EF21-PP (Fatkhullin et al. 2021): in every round each worker takes part with some probability.

c_i = C(grad f_i(x) - g_i) for i in S, else 0
g_i = g_i + c_i ;  g = g + mean_i c_i  (over all n workers) ;  emit g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    Array,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_key,
    as_transformation,
    check,
    collectives,
    difference,
    exchange_for,
    memory_for,
    shares,
    trees,
)


class EF21PartialParticipationState(NamedTuple):
    """State of :func:`ef21_partial_participation`."""

    estimate: Any  # per worker, like the parameters: g_i
    mean: Any  # like the parameters: the mean of all estimates
    present: Array  # per worker, float32 scalar: 1 if it took part in the last round, else 0
    exchange: ExchangeState


def ef21_partial_participation(
    compressor: Compressor,
    probability: float | Sequence[float],
    key: Any,
    *,
    weights: Sequence[float] | None = None,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-PP: EF21 in which absent workers keep their old estimates in the mean over all.

    .. math:: c_i = \begin{cases} C(\nabla f_i(x) - g_i) & i \in S \\ 0 & \text{else}\end{cases},
              \quad g_i' = g_i + c_i, \quad \text{emit}\ g' = g + \text{mean}_i\,c_i

    Every worker draws independently (Poisson sampling). In the first round all workers take part,
    which gives the start g_i^0. In the papers' accounting an absent worker sends nothing; in this
    program a message of the same size still travels. Step size:
    :func:`ef_optax.theory.ef21_partial_participation_step`.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      probability: p in (0, 1] for all workers, or one p for each of the n workers.
      key: a JAX random key or an int; the step and the worker are folded in.
      weights: None, or EF21-W's weights (EF21-W-PP; its step size is an unverified constant).
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an
      :class:`EF21PartialParticipationState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor or ``key`` is not a key. ValueError: for a
        probability outside (0, 1], bad weights, an unknown ``init`` or a compressor that is not
        additive; at init, for a compressor that makes the memory of a leaf grow (scaled random-k
        with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_partial_participation(ef.top_k(k=1), 0.5, 0, axis_name="w")
      >>> tx = ef.simulate(tx, 4, "w")
      >>> grads, params = jnp.ones((4, 2)), jnp.zeros(2)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates, state = tx.update(grads, state, params)
      >>> bool(updates[1] == state.present.mean())  # the second coordinate, of those present
      True

    References:
      Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells & Whistles", 2021.
    """
    rule = "ef21_partial_participation"
    check.word(rule, "init", init, difference.INITS)
    several = tuple(probability) if isinstance(probability, Sequence) else (probability,)
    for p in several:
        check.weight(rule, "probability", p)
    if weights is not None:
        shares.check_shares(rule, weights)
    key = as_key(key, rule)
    exchange = exchange_for(rule, compressor, axis_name, needs=(ADDITIVE, CONTRACTIVE))
    estimates = difference.Estimates(exchange, memory_for(memory, axis_name), init)

    def drawn(count: Array) -> Array:
        """1 if this worker takes part, else 0."""
        n = collectives.axis_size(axis_name)
        if len(several) not in (1, n):
            raise ValueError(f"{rule}: probability has {len(several)} numbers for {n} workers.")
        own = collectives.axis_index(axis_name) if len(several) > 1 else 0
        p = jnp.asarray(several, jnp.float32)[own]
        draw = jax.random.uniform(shares.draw(key, count, axis_name), dtype=jnp.float32)
        takes_part = draw < p
        return jnp.where(count == 0, True, takes_part).astype(jnp.float32)

    def init_fn(params: Any) -> EF21PartialParticipationState:
        g_i, g, sent = estimates.begin(params)
        return EF21PartialParticipationState(g_i, g, jnp.ones((), jnp.float32), sent)

    def update_fn(
        updates: Any, state: EF21PartialParticipationState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21PartialParticipationState]:
        del params, extra_args
        target, share = trees.wide(updates), None
        if weights is not None:
            share = shares.own_share(rule, weights, axis_name)
            target = jax.tree.map(lambda x: x / share.astype(x.dtype), target)
        present = drawn(state.exchange.step)
        _, g, (estimate, mean, sent) = estimates.follow(
            target, state.estimate, state.mean, state.exchange, share=share, present=present
        )
        after = EF21PartialParticipationState(estimate, mean, present, sent)
        return trees.emit(g, updates), after

    return as_transformation(init_fn, update_fn)
