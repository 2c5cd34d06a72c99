"""EF21+ (Richtarik, Sokolov, Fatkhullin 2021): every worker sends the better of two messages.

b = C(grad f_i)                     forgets the estimate
m = g_i + C(grad f_i - g_i)         improves the estimate, as EF21 does
g_i = the nearer of b and m to grad f_i, m if they are equally near;  emit mean_i g_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    DETERMINISTIC,
    INDEPENDENT,
    AxisName,
    Compressor,
    Exchange,
    ExchangeState,
    Identity,
    MemoryLike,
    as_transformation,
    check,
    collectives,
    difference,
    exchange_for,
    memory_for,
    trees,
)


class EF21PlusState(NamedTuple):
    """State of :func:`ef21_plus`."""

    estimate: Any  # per worker, like the parameters: g_i
    mean: Any  # like the parameters: the mean of the estimates
    exchange: ExchangeState


def ef21_plus(
    compressor: Compressor,
    *,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21+: every worker takes the nearer of C(gradient) and EF21's estimate.

    .. math:: b = C(\nabla f_i), \quad m = g_i + C(\nabla f_i - g_i), \quad g_i' =
              \text{the nearer of } b, m \text{ to } \nabla f_i, \quad \text{emit mean}_i\,g_i'

    From the same estimate, no worker's error is larger than that of EF21. The receivers keep only
    the mean of the estimates. If some worker forgets its estimate, a dense all-reduce therefore
    subtracts it from the mean; other steps cost a message and a flag. Compression runs three times
    per step.

    Args:
      compressor: what is sent; deterministic and contractive, such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef21`.
      memory: the dtype in which the estimates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EF21PlusState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an unknown ``init`` or a
        compressor that is randomised or not additive.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef21_plus(ef.top_k(k=1))
      >>> params = jnp.zeros(2)
      >>> _, state = tx.update(jnp.array([9.0, 1.0]), tx.init(params), params)
      >>> tx.update(jnp.array([0.0, 5.0]), state, params)[0].tolist()  # forgets the 9
      [0.0, 5.0]

    References:
      Richtarik, Sokolov, Fatkhullin, "EF21", NeurIPS 2021; ties as in the authors'
      code, IgorSokoloff/ef21_experiments_source_code.
    """
    check.word("ef21_plus", "init", init, difference.INITS)
    exchange = exchange_for(
        "ef21_plus",
        compressor,
        axis_name,
        needs=(ADDITIVE, CONTRACTIVE, DETERMINISTIC, INDEPENDENT),
    )
    local, dense = Exchange(exchange.codec), Exchange(Identity(), axis_name)
    estimates = difference.Estimates(exchange, memory_for(memory, axis_name), init)

    def init_fn(params: Any) -> EF21PlusState:
        return EF21PlusState(*estimates.begin(params))

    def update_fn(
        updates: Any, state: EF21PlusState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EF21PlusState]:
        del params, extra_args
        grad = trees.wide(updates)

        def compressed(x: Any) -> Any:
            return local(x, state.exchange, want=("sent",)).sent

        def nearer(g_i: Any, g: Any) -> difference.Followed:
            news = trees.sub(grad, g_i)
            b = compressed(grad)
            m = trees.add(g_i, compressed(news))
            error_b, error_m = (trees.squared_norm(trees.sub(c, grad)) for c in (b, m))
            forget = error_b < error_m
            out = exchange(trees.where(forget, grad, news), state.exchange, want=("sent",))
            forgotten = jax.tree.map(lambda x: jnp.where(forget, x, 0), g_i)
            some_forget = collectives.pmax(forget.astype(jnp.int32), axis_name) > 0
            taken_back = collectives.agreed_cond(
                some_forget,
                lambda: dense(forgotten, out.state._replace(codec=())).aggregate,
                lambda: jax.tree.map(jnp.zeros_like, g),
                axis=axis_name,
            )
            own = trees.add(trees.sub(g_i, forgotten), out.sent)
            return own, trees.sub(trees.add(g, out.aggregate), taken_back), out.state

        _, g, kept = estimates.follow(grad, *state, later=nearer)
        return trees.emit(g, updates), EF21PlusState(*kept)

    return as_transformation(init_fn, update_fn)
