"""Safe-EF (Islamov et al. 2025): error feedback under a constraint on the mean over workers.

h_i = grad f_i(x) if mean_j c_j(x) <= 0, else grad c_i(x)
v_i = C(e_i + h_i) ;  e_i = e_i + h_i - v_i ;  w = w - gamma mean_i v_i ;  x = x + C_0(w - x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.extend import (
    CONTRACTIVE,
    Array,
    AxisName,
    Compressor,
    Exchange,
    ExchangeState,
    Identity,
    MemoryLike,
    as_transformation,
    check,
    exchange_for,
    memory_for,
    steps,
    trees,
)


class SafeEFState(NamedTuple):
    """State of :func:`safe_ef`."""

    residual: Any  # per worker, like the parameters: e_i
    safe: Array  # bool scalar: whether the constraint held at the last point
    exchange: ExchangeState
    constraint: ExchangeState


def safe_ef(
    compressor: Compressor,
    *,
    tolerance: float = 0.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Safe-EF: descends on the objective while the constraint holds, else on the constraint.

    .. math:: h_i = \begin{cases}\nabla f_i(x) & \text{mean}_j\,c_j(x) \le \tau \\ \nabla c_i(x)
              & \text{else}\end{cases}, \quad v_i = C(e_i + h_i), \quad e_i' = e_i + h_i - v_i,
              \quad \text{emit mean}_i\,v_i

    The value of every worker's constraint and its gradient are extra arguments. The compressed
    downlink ``x + C_0(w - x)`` is :func:`ef21_p`, so the complete method is
    ``chain(safe_ef(C, axis_name=a), optax.sgd(gamma), ef21_p(C_0))``.

    Args:
      compressor: C, what is sent.
      tolerance: tau, up to which the mean constraint counts as satisfied.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the residual is stored, as in :func:`error_feedback`.

    Returns:
      The transformation; its state is a :class:`SafeEFState`. Call ``update(grads, state, params,
      constraint=..., constraint_grads=...)``. Under :func:`data_parallel` and :func:`simulate` both
      arguments are :class:`PerWorker`, and the lift needs examples of one worker's arguments:
      ``extra_args={"constraint": 0.0, "constraint_grads": params}``.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: at update, if the constraint or
        its gradient is missing; at init, for a compressor that makes the memory of a leaf grow
        (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.safe_ef(ef.identity())
      >>> state, g, c = tx.init(jnp.zeros(1)), jnp.array([1.0]), jnp.array([-5.0])
      >>> inside, _ = tx.update(g, state, constraint=-0.1, constraint_grads=c)
      >>> outside, _ = tx.update(g, state, constraint=0.1, constraint_grads=c)
      >>> inside.tolist(), outside.tolist()
      ([1.0], [-5.0])

    References:
      Islamov, As, Fatkhullin, "Safe-EF: Error Feedback for Nonsmooth Constrained Optimization",
      ICML 2025; update as in the authors' code, yardenas/safe-ef.
    """
    check.finite("safe_ef", "tolerance", tolerance)
    exchange = exchange_for("safe_ef", compressor, axis_name, needs=(CONTRACTIVE,))
    dense = Exchange(Identity(), axis_name)
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> SafeEFState:
        e = memory.zeros(params)
        wide = memory.read(e)
        return SafeEFState(e, jnp.ones((), bool), exchange.init(wide), dense.init(wide))

    def update_fn(
        updates: Any,
        state: SafeEFState,
        params: Any = None,
        *,
        constraint: Any = None,
        constraint_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, SafeEFState]:
        del params, extra_args
        if constraint is None or constraint_grads is None:
            raise ValueError(
                "safe_ef: pass each worker's constraint and its gradient: update(grads, state, "
                "params, constraint=PerWorker(values), constraint_grads=PerWorker(gradients))."
            )
        # Adding a zero from the gradient gives a replicated value the type of a per-worker one.
        own = jnp.asarray(constraint, trees.widest(updates))
        for x in jax.tree.leaves(updates)[:1]:
            own = own + jnp.sum(x * 0).astype(own.dtype)
        value = dense(steps.lone(own), state.constraint)
        safe = value.aggregate[steps.LONE] <= tolerance
        h = trees.where(safe, trees.wide(updates), constraint_grads)
        e = memory.read(state.residual)
        out = exchange(trees.add(h, e), state.exchange, want=("residual",))
        e = memory.write(out.residual, state.residual, out.state.step)
        after = SafeEFState(e, safe, out.state, value.state)
        return trees.emit(out.aggregate, updates), after

    return as_transformation(init_fn, update_fn)
