"""EF-BV (Condat, Yi, Richtarik 2022), which includes EF21 and DIANA.

d_i = C(grad f_i(x) - h_i)
g   = h + nu mean_i d_i ;  emit g
h_i = h_i + lambda d_i ;  h = h + lambda mean_i d_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from ef_optax.extend import (
    ADDITIVE,
    UNBIASED,
    AxisName,
    Compressor,
    Exchange,
    ExchangeState,
    MemoryLike,
    Recurrence,
    as_transformation,
    check,
    collectives,
    difference,
    exchange_for,
    for_leaf,
    memory_for,
    path_string,
    trees,
)


class EFBVState(NamedTuple):
    """State of :func:`ef_bv` and :func:`diana`."""

    control: Any  # per worker, like the parameters: h_i
    mean: Any  # like the parameters: h, the mean of the h_i
    exchange: ExchangeState


def ef_bv(
    compressor: Compressor,
    lam: float,
    nu: float = 1.0,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF-BV: one form for biased and unbiased compressors.

    .. math:: d_i = C(\nabla f_i(x) - h_i), \quad \text{emit}\ h + \nu\,\text{mean}_i\,d_i, \quad
              h_i' = h_i + \lambda d_i

    ``lam = nu = 1`` is :func:`ef21`; ``lam = 1/(1 + omega), nu = 1`` is :func:`diana`. The best
    values for bias eta and variance omega: :func:`ef_optax.theory.ef_bv_parameters`.

    Args:
      compressor: what is sent.
      lam: lambda in (0, 1], how far the control variates follow.
      nu: weight in (0, 1] of the fresh differences.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the control variates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EFBVState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for lam or nu outside (0, 1], or
        a compressor that is not additive.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.ef_bv(ef.identity(), lam=0.5)
      >>> updates, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> updates.tolist(), state.control.tolist()
      ([4.0], [2.0])

    References:
      Condat, Yi, Richtarik, "EF-BV: A Unified Theory of Error Feedback and Variance Reduction
      Mechanisms for Biased and Unbiased Compression", NeurIPS 2022.
    """
    check.weight("ef_bv", "lam", lam)
    check.weight("ef_bv", "nu", nu)
    exchange = exchange_for(
        "ef_bv",
        compressor,
        axis_name,
        needs=(ADDITIVE,),
        recurrence=Recurrence(1 - lam, lam, "use lam={best:.3g} or less"),
    )
    return _control_variates("ef_bv", exchange, lam, nu, memory)


def diana(
    compressor: Compressor,
    rate: float | None = None,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DIANA: unbiased compression of differences to slowly learned control variates.

    .. math:: m_i = Q(\nabla f_i(x) - h_i), \quad \text{emit}\ h + \text{mean}_i\,m_i, \quad
              h_i' = h_i + a\,m_i, \quad h_i^0 = 0

    Args:
      compressor: what is sent; unbiased, such as ``ef.random_k(0.1, key=0, scaled=True)``.
      rate: a in (0, 1]; by default ``1/(1 + omega)`` for each leaf.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the control variates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``; its state is an :class:`EFBVState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a rate outside (0, 1], or
        (without ``rate``) a leaf whose compressor has no known omega, or a compressor that is not
        additive.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.diana(ef.random_k(key=0, k=1, scaled=True))
      >>> updates, state = tx.update(jnp.array([4.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> sorted(updates.tolist()), sorted(state.control.tolist())  # omega = 1, a = 1/2
      ([0.0, 8.0], [0.0, 4.0])

    References:
      Mishchenko, Gorbunov, Takac, Richtarik, "Distributed Learning with Compressed Gradient
      Differences", 2019.
    """
    if rate is not None:
        check.weight("diana", "rate", rate)
    recurrence = None if rate is None else Recurrence(1 - rate, rate, "use rate={best:.3g} or less")
    needs = (ADDITIVE, UNBIASED)
    exchange = exchange_for("diana", compressor, axis_name, needs=needs, recurrence=recurrence)
    return _control_variates("diana", exchange, rate, 1.0, memory)


def _control_variates(
    rule: str, exchange: Exchange, lam: float | None, nu: float, memory: MemoryLike
) -> optax.GradientTransformationExtraArgs:
    memory = memory_for(memory, exchange.axis_name)
    estimates = difference.Estimates(exchange, memory)

    def step(path: Any, x: Any) -> float:
        """The lambda of one leaf."""
        if lam is not None:
            return lam
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        omega = for_leaf(exchange.codec, path_string(path), like).omega(
            x.shape, collectives.axis_size(exchange.axis_name)
        )
        if omega is None:
            raise ValueError(
                f"{rule}: {exchange.codec.name} has no known variance omega; give rate=."
            )
        return 1 / (1 + omega)

    def init_fn(params: Any) -> EFBVState:
        return EFBVState(*estimates.begin(params))

    def update_fn(
        updates: Any, state: EFBVState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, EFBVState]:
        del params, extra_args
        h_i, h = memory.read((state.control, state.mean))
        out = exchange(trees.sub(trees.wide(updates), h_i), state.exchange, want=("sent",))
        g = trees.axpy(nu, out.aggregate, h)
        slow = jax.tree_util.tree_map_with_path(step, h_i)
        h_i = jax.tree.map(lambda h, a, d: h + a * d, h_i, slow, out.sent)
        h = jax.tree.map(lambda h, a, d: h + a * d, h, slow, out.aggregate)
        kept = estimates.keep(h_i, h, out.state, state.control, state.mean)
        return trees.emit(g, updates), EFBVState(*kept)

    return as_transformation(init_fn, update_fn)
