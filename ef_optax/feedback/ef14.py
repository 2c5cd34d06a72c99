"""EF14, the error feedback of Seide et al. (2014), Stich et al. (2018), Karimireddy et al. (2019).

    p_i = g_i + e_i          what this worker wants to say, with what it still owes
    c_i = C(p_i)             what it says
    e_i = p_i - c_i          what it owes now: the input minus what the receivers decoded
    emit mean_i c_i

Where the transformation stands in the chain decides the units. Before ``optax.sgd`` it works in
gradient units; after it in step units, which is Karimireddy's Algorithm 1; ``learning_rate`` gives
the learning-rate-corrected form, equal to step units for every homogeneous compressor.
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
    ExchangeState,
    MemoryLike,
    as_transformation,
    bits_of,
    check,
    exchange_for,
    memory_for,
    wide_dtype,
)


class ErrorFeedbackState(NamedTuple):
    """State of :func:`error_feedback`."""

    residual: Any  # per worker, like the parameters: what was not yet sent (e_i)
    last_rate: Any  # float32 scalar: the last non-zero learning rate; () without learning_rate
    exchange: ExchangeState


def compensate(g: Array, e: Array) -> Array:
    """``g + e`` in the wider of the two dtypes, float32 at the least."""
    wide = max(wide_dtype(g.dtype), wide_dtype(e.dtype), key=bits_of)
    return g.astype(wide) + e.astype(wide)


def _is_one(factor: Any) -> bool:
    """Whether there is nothing to multiply; not so if the factor is known at run time only."""
    return isinstance(factor, int | float) and factor == 1


def error_feedback(
    compressor: Compressor,
    *,
    axis_name: AxisName = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    decay: float = 1.0,
    injection: float = 1.0,
    memory: MemoryLike = None,
    update_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback: what compression drops is kept and added to the next gradient.

    .. math:: p = g + a e, \quad c = C(p), \quad e' = b\,(g + e - c), \quad \text{emit mean}_i\,c_i

    with injection a = 1 and retention b = 1 (then e' = p - c). So with e_0 = 0 nothing is lost:
    the sum of all c plus the residual is the sum of all g. The first gradient is compressed too.

    Args:
      compressor: what is sent; a :class:`Compressor` such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes) over which messages are exchanged; None for
        one worker. Updates are local before and the mean over workers after.
      learning_rate: the optimizer's own rate or schedule (the same object), for the corrected form
        p = g + (lr_{t-1} / lr_t) e in gradient units. Where the rate is zero nothing is applied
        and e is kept; the ratio uses the last non-zero rate.
      decay: retention b; below 1 it gives (1 - b) of the residual away at every step.
      injection: strength a of the residual in what is compressed; no mass is lost for any a.
      memory: the dtype in which the residual is kept; None for float32 (float64 for float64
        parameters). A narrower one loses the rounding error at every step.
      update_dtype: dtype of the emitted updates; default that of the input. bfloat16 rounds the
        aggregate *after* the residual was taken; float32 keeps it.

    Returns:
      The transformation; its state is an :class:`ErrorFeedbackState`. With an axis name the
      residual differs between workers: see :func:`data_parallel` and :func:`worker_axes`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a bad learning rate, decay
        or injection; at init, for a compressor whose error is as long as any input (scaled random-k
        with omega >= 1), unless decay or injection hold the residual down; and while tracing a
        checked ``shard_map``, if the updates are already reduced over the axis.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([3.0, 2.0]), state, params)
      >>> state[0].residual.tolist()  # the 2 was not sent: it is owed
      [0.0, 2.0]
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
      >>> [round(-u, 6) for u in updates.tolist()]  # now 2 + 1 go out together
      [0.0, 0.3]

    References:
      Karimireddy, Rebjock, Stich, Jaggi, Error feedback fixes SignSGD, 2019, Algorithms 1-2;
      Stich, Cordonnier, Jaggi, Sparsified SGD with memory, 2018; the corrected form: Zheng, Huang,
      Kwok, Blockwise momentum SGD with error feedback, 2019.
    """
    check.rate("error_feedback", "learning_rate", learning_rate, optional=True)
    check.share("error_feedback", "decay", decay)
    check.finite("error_feedback", "injection", injection)
    plain = _is_one(decay) and _is_one(injection)
    # Decay and injection hold the memory of a codec down that is no contraction.
    needs = (CONTRACTIVE,) if plain else ()
    exchange = exchange_for("error_feedback", compressor, axis_name, needs=needs)
    memory = memory_for(memory, axis_name)

    def rate_at(count: Array) -> Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(rate, jnp.float32)

    def init_fn(params: Any) -> ErrorFeedbackState:
        residual = memory.zeros(params)
        rate = () if learning_rate is None else jnp.zeros((), jnp.float32)
        return ErrorFeedbackState(residual, rate, exchange.init(memory.read(residual)))

    def update_fn(
        updates: Any, state: ErrorFeedbackState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ErrorFeedbackState]:
        del params, extra_args
        e, last, active = memory.read(state.residual), state.last_rate, None
        if learning_rate is not None:
            rate = rate_at(state.exchange.count)
            active = rate != 0
            ratio = last / jnp.where(active, rate, 1)
            e = jax.tree.map(lambda x: x * ratio.astype(x.dtype), e)
            last = jnp.where(active, rate, last)
        owed = e if _is_one(injection) else jax.tree.map(lambda x: injection * x, e)
        p = jax.tree.map(compensate, updates, owed)

        def again() -> Any:
            # From a gradient that the compiler cannot tell is the same one, or it would write the
            # sum down. Not so the residual: a hidden buffer is not overwritten in place.
            hidden = jax.tree.map(jax.lax.optimization_barrier, updates)
            return jax.tree.map(compensate, hidden, owed)

        out = exchange(p, state.exchange, want=("residual",), again=again)
        kept = out.residual
        if not _is_one(injection):
            kept = jax.tree.map(lambda r, x: r + (1.0 - injection) * x.astype(r.dtype), kept, e)
        if not _is_one(decay):
            kept = jax.tree.map(lambda r: decay * r, kept)
        kept = memory.write(kept, state.residual, out.state.count)
        aggregate = out.aggregate
        if active is not None:
            kept = jax.tree.map(lambda r, x: jnp.where(active, r, x), kept, state.residual)
            aggregate = jax.tree.map(lambda c: jnp.where(active, c, 0), aggregate)
        emitted = jax.tree.map(lambda c, g: c.astype(update_dtype or g.dtype), aggregate, updates)
        return emitted, ErrorFeedbackState(kept, last, out.state)

    return as_transformation(init_fn, update_fn)
