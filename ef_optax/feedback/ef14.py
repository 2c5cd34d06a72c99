"""EF14, the error feedback of Seide et al. (2014), Stich et al. (2018), Karimireddy et al. (2019).

    p_i = g_i + e_i          the gradient plus the residual of the last step
    c_i = C(p_i)             what this worker sends
    e_i = p_i - c_i          the residual: the input minus what the receivers decoded
    emit mean_i c_i

The position of the transformation in the chain decides the units of the residual. Before
``optax.sgd`` these are gradient units, after it step units, as in Karimireddy's Algorithm 1.
``learning_rate`` gives the learning-rate-corrected form, which equals step units for every
homogeneous compressor.
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
    Recurrence,
    arguments,
    as_transformation,
    bits_of,
    check,
    exchange_for,
    memory_for,
    trees,
    wide_dtype,
)


class ErrorFeedbackState(NamedTuple):
    """State of :func:`error_feedback`."""

    residual: Any  # per worker, like the parameters: e_i, what is not yet sent
    last_rate: Any  # scalar: the last non-zero learning rate; () without learning_rate
    exchange: ExchangeState


def compensate(g: Array, e: Array) -> Array:
    """``g + e`` in the wider of the two dtypes, and at least in float32."""
    wide = max(wide_dtype(g.dtype), wide_dtype(e.dtype), key=bits_of)
    return g.astype(wide) + e.astype(wide)


def _is_one(factor: Any) -> bool:
    """Whether the factor is a Python 1; a factor known only at run time always multiplies."""
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

    By default the injection a and the retention b are 1, so that e' = p - c. Then nothing is lost:
    with e_0 = 0, the sum of all c plus the residual is the sum of all g. The first gradient is
    compressed too.

    Args:
      compressor: what is sent; a :class:`Compressor` such as ``ef.top_k(0.01)``.
      axis_name: the worker axis (or a tuple of axes) over which messages are exchanged; None for
        one worker. The updates are local before the rule and the mean over workers after it.
      learning_rate: the optimizer's own rate or schedule (the same object), for the corrected form
        p = g + (lr_{t-1} / lr_t) e in gradient units. In a step whose rate is zero nothing is
        applied and e is kept; the ratio uses the last non-zero rate.
      decay: retention b; below 1 the residual loses (1 - b) of itself at every step.
      injection: weight a of the residual in what is compressed; nothing is lost for any a.
      memory: how the residual is stored. None is float32 (float64 for float64 parameters). A dtype
        such as ``"bfloat16"`` loses the rounding error at every step. A stateless compressor
        encodes it: ``ef.cast("bfloat16", key=0)`` takes 2 bytes a value and rounds at random,
        ``ef.block_quantize(8, block=128, key=0)`` takes 1.03 and with 4 bits 0.53,
        ``ef.top_k(0.1)`` keeps the largest values, and ``ef.per_leaf`` chooses for each leaf. What
        this loses is counted in ``lost`` of :class:`ef_optax.extend.Stored`. :func:`on_host` keeps
        any of them in the host's memory.
      update_dtype: dtype of the emitted updates; by default that of the input. bfloat16 rounds the
        aggregate *after* the residual is computed, so the rounding error is lost; float32 avoids
        this.

    Returns:
      The transformation; its state is an :class:`ErrorFeedbackState`. With an axis name the
      residual differs between workers: see :func:`data_parallel` and :func:`worker_axes`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a bad learning rate, decay
        or injection; at init, for a compressor whose error on noise is as large as its input
        (scaled random-k with omega >= 1), unless decay or injection keep the residual small; and in
        a checked ``shard_map``, if the updates are already reduced over the axis.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = optax.chain(ef.error_feedback(ef.top_k(k=1)), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([3.0, 2.0]), state, params)
      >>> state[0].residual.tolist()  # the 2 was not sent
      [0.0, 2.0]
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
      >>> [round(-u, 6) for u in updates.tolist()]  # now 2 + 1 is sent
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
    # Decay and injection may keep the memory small even if the codec is not contractive.
    damped = Recurrence(decay * (1 - injection), decay * injection)
    needs, recurrence = ((CONTRACTIVE,), None) if plain else ((), damped)
    exchange = exchange_for(
        "error_feedback", compressor, axis_name, needs=needs, recurrence=recurrence
    )
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> ErrorFeedbackState:
        residual = memory.zeros(params)
        rate = () if learning_rate is None else jnp.zeros((), trees.widest(params))
        return ErrorFeedbackState(residual, rate, exchange.init(memory.read(residual)))

    def update_fn(
        updates: Any, state: ErrorFeedbackState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ErrorFeedbackState]:
        del params, extra_args
        e, last, active = memory.read(state.residual), state.last_rate, None
        if learning_rate is not None:
            rate = arguments.value_at(learning_rate, state.exchange.step)
            rate = jnp.asarray(rate, last.dtype)
            active = rate != 0
            ratio = last / jnp.where(active, rate, 1)
            e = jax.tree.map(lambda x: x * ratio.astype(x.dtype), e)
            last = jnp.where(active, rate, last)
        injected = e if _is_one(injection) else jax.tree.map(lambda x: injection * x, e)
        p = jax.tree.map(compensate, updates, injected)

        def again() -> Any:
            # The barrier hides that the gradient is the same one; else the compiler would store the
            # sum. The residual is not hidden, because it could not be overwritten in place then.
            hidden = jax.tree.map(jax.lax.optimization_barrier, updates)
            return jax.tree.map(compensate, hidden, injected)

        out = exchange(p, state.exchange, want=("residual",), again=again)
        kept = out.residual
        if not _is_one(injection):
            kept = jax.tree.map(lambda r, x: r + (1.0 - injection) * x.astype(r.dtype), kept, e)
        if not _is_one(decay):
            kept = jax.tree.map(lambda r: decay * r, kept)
        kept = memory.write(kept, state.residual, out.state.step)
        aggregate = out.aggregate
        if active is not None:
            kept = jax.tree.map(lambda r, x: jnp.where(active, r, x), kept, state.residual)
            aggregate = jax.tree.map(lambda c: jnp.where(active, c, 0), aggregate)
        emitted = jax.tree.map(lambda c, g: c.astype(update_dtype or g.dtype), aggregate, updates)
        return emitted, ErrorFeedbackState(kept, last, out.state)

    return as_transformation(init_fn, update_fn)
