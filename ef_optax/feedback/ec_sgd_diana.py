"""EC-SGD-DIANA (Gorbunov et al. 2020): error compensation around DIANA's shifted gradients.

g_i = ghat_i - h_i + h
v_i = C(e_i + gamma g_i) ;  e_i = e_i + gamma g_i - v_i
h_i = h_i + a Q(ghat_i - h_i) ;  h = mean_i h_i ;  x = x - mean_i v_i
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from ef_optax.extend import (
    ADDITIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    Recurrence,
    as_transformation,
    check,
    difference,
    exchange_for,
    memory_for,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback


class ShiftState(NamedTuple):
    """State of :func:`gradient_shift`."""

    control: Any  # per worker, like the parameters: h_i
    mean: Any  # like the parameters: h, the mean of the h_i
    exchange: ExchangeState


def gradient_shift(
    compressor: Compressor,
    rate: float,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shifts each worker's gradient by control variates: ``g_i = ghat_i - h_i + h``.

    .. math:: \text{emit}\ \hat g_i - h_i + h, \quad h_i' = h_i + a\,Q(\hat g_i - h_i)

    The mean over workers is unchanged, but at the optimum the workers' gradients become equal. The
    emitted gradients are still local, so an exchange must follow.

    Args:
      compressor: Q of the control variates, unbiased.
      rate: a in (0, 1], at most ``1/(1 + omega)``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the control variates are stored, as in :func:`ef21`.

    Returns:
      The transformation; its state is a :class:`ShiftState`.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a rate outside (0, 1] or a
        compressor that is not additive.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.gradient_shift(ef.identity(), 0.5)
      >>> updates, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> updates.tolist(), state.control.tolist()
      ([4.0], [2.0])
    """
    check.weight("gradient_shift", "rate", rate)
    exchange = exchange_for(
        "gradient_shift",
        compressor,
        axis_name,
        needs=(ADDITIVE,),
        recurrence=Recurrence(1 - rate, rate, "use rate={best:.3g} or less"),
    )
    memory = memory_for(memory, axis_name)
    estimates = difference.Estimates(exchange, memory)

    def init_fn(params: Any) -> ShiftState:
        return ShiftState(*estimates.begin(params))

    def update_fn(
        updates: Any, state: ShiftState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ShiftState]:
        del params, extra_args
        h_i, h = memory.read((state.control, state.mean))
        news = trees.sub(trees.wide(updates), h_i)
        out = exchange(news, state.exchange, want=("sent",))
        shifted = trees.add(news, h)
        h_i = trees.axpy(rate, out.sent, h_i)
        h = trees.axpy(rate, out.aggregate, h)
        kept = estimates.keep(h_i, h, out.state, state.control, state.mean)
        return trees.emit(shifted, updates), ShiftState(*kept)

    return as_transformation(init_fn, update_fn)


def ec_sgd_diana(
    compressor: Compressor,
    control: Compressor,
    rate: float,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    """EC-SGD-DIANA: ``chain(gradient_shift(control, rate), error_feedback(compressor))``.

    It converges with a constant step even if the workers' gradients differ at the optimum, unlike
    classic error feedback. It is written in gradient units. For the paper's step units put
    ``optax.sgd`` between the two parts, or give ``learning_rate``, which is equivalent for
    homogeneous compressors.

    Args:
      compressor: C, contractive, used with error feedback.
      control: Q of the control variates, unbiased.
      rate: a in (0, 1], at most ``1/(1 + omega)``.
      learning_rate: the optimizer's rate or schedule, as in :func:`error_feedback`.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which the control variates are stored, as in :func:`ef21`.

    Returns:
      The transformation, to be put before ``optax.sgd``.

    Raises:
      TypeError: if an argument is not a Compressor. ValueError: for a rate outside (0, 1] or a
        control compressor that is not additive.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.ec_sgd_diana(ef.top_k(k=1), ef.random_k(key=0, k=1, scaled=True), 0.5)
      >>> jax.jit(tx.update)(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))[0].tolist()
      [4.0, 0.0]

    References:
      Gorbunov, Kovalev, Makarenko, Richtarik, "Linearly Converging Error Compensated SGD", NeurIPS
      2020 (EC-SGD-DIANA).
    """
    check.weight("ec_sgd_diana", "rate", rate)
    check.rate("ec_sgd_diana", "learning_rate", learning_rate, optional=True)
    return optax.with_extra_args_support(
        optax.chain(
            gradient_shift(control, rate, axis_name=axis_name, memory=memory),
            error_feedback(
                compressor, axis_name=axis_name, learning_rate=learning_rate, memory=memory
            ),
        )
    )
