"""CSER (Xie et al. 2020): partial synchronisation, with the error reset every few steps.

PSync(v, C)_i = mean_j C(v_j) + r_i ,  r_i = v_i - C(v_i)
every step:     (g'_i, r_i) = PSync(g, C2) ;  x_i = x_i - eta g'_i ;  e_i = e_i - eta r_i
every H steps:  (e'_i, e_i) = PSync(e, C1) ;  x_i = x_i + e'_i - (e_i before)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.extend import (
    ADDITIVE,
    CONTRACTIVE,
    AxisName,
    Compressor,
    ExchangeState,
    MemoryLike,
    as_transformation,
    check,
    exchange_for,
    memory_for,
    own_models,
    steps,
    trees,
)


class CSERState(NamedTuple):
    """State of :func:`cser`."""

    ahead: Any  # per worker, like the parameters: e_i, this worker's model minus the common one
    gradients: ExchangeState
    errors: ExchangeState

    def points(self, params: Any) -> dict[str, Any]:
        """Each worker's own model, at which its gradient is taken."""
        return own_models.own_model("cser", self.ahead, params)


def cser(
    errors: Compressor,
    gradients: Compressor | None,
    learning_rate: optax.ScalarOrSchedule,
    period: int,
    *,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""CSER: a worker applies the part of its step that it does not send to its own model at once.

    Every worker has a model ``x_i``, and ``x_i - e_i`` is the same on all of them. This common
    part, z, is what the training loop holds as parameters; gradients are taken at ``z + e_i``
    (:func:`query_points`). In these terms

    .. math:: z' = z - \eta\,\text{mean}_i\,C_2(g_i), \quad e_i' = e_i - \eta (g_i - C_2(g_i)),

    and every ``period`` steps ``z += mean C_1(e_i)``, ``e_i -= C_1(e_i)``. It is a complete
    optimizer, so no transformation after it may change the updates. With
    ``errors=ef.identity(), gradients=None`` it is local SGD with that period. The model to evaluate
    is ``z + mean_i e_i``.

    Args:
      errors: C_1, what is sent of the errors every ``period`` steps.
      gradients: C_2, what is sent of the gradients at every step. None sends only one number, which
        shows whether all gradients are finite.
      learning_rate: eta, a number or a schedule.
      period: H, at least 1.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype in which e is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`CSERState`. Call
      ``update(grads["params"], state, params, grads=grads)`` with gradients at all query points.

    Raises:
      TypeError: if an argument is not a Compressor. ValueError: for a period below 1, a compressor
        that is not additive, and at update if gradients at the query points are missing; at init,
        for a compressor that makes the memory of a leaf grow (scaled random-k with omega >= 1).

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.local.cser(ef.identity(), ef.top_k(k=1), 1.0, period=2)
      >>> params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
      >>> grads = {"cser": jnp.array([3.0, 2.0])}
      >>> updates, state = tx.update(grads["cser"], state, params, grads=grads)
      >>> updates.tolist(), state.ahead.tolist()
      ([-3.0, -0.0], [0.0, -2.0])

    References:
      Xie, Zheng, Koyejo, Gupta, Li, Lin, "CSER: Communication-efficient SGD with Error Reset",
      NeurIPS 2020.
    """
    check.rate("cser", "learning_rate", learning_rate)
    check.count("cser", "period", period)
    reset = exchange_for(
        "cser", errors, axis_name, argument="errors", needs=(ADDITIVE, CONTRACTIVE)
    )
    of_gradients = identity() if gradients is None else gradients
    every = exchange_for("cser", of_gradients, axis_name, argument="gradients", needs=(ADDITIVE,))
    memory = memory_for(memory, axis_name)

    def init_fn(params: Any) -> CSERState:
        e = memory.zeros(params)
        wide = memory.read(e)
        return CSERState(ahead=e, gradients=every.init(wide), errors=reset.init(wide))

    def update_fn(
        updates: Any, state: CSERState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CSERState]:
        del params
        count = state.gradients.step
        g, eta = own_models.own_gradient("cser", learning_rate, count, extra_args)
        if gradients is None:
            sent, state_g = steps.silent(every, g, state.gradients)
            unsent = g
        else:
            out = every(g, state.gradients, want=("residual",))
            sent, unsent, state_g = out.aggregate, out.residual, out.state
        z_step = trees.scale(-jnp.asarray(eta), sent)
        e = own_models.descend(memory.read(state.ahead), eta, unsent)

        def synchronise() -> tuple[Any, Any, ExchangeState]:
            out = reset(e, state.errors, want=("residual",))
            return trees.add(z_step, out.aggregate), out.residual, out.state

        def go_on() -> tuple[Any, Any, ExchangeState]:
            return z_step, e, state.errors

        z_step, e, state_e = own_models.every(period, state_g.step, synchronise, go_on, axis_name)
        e = memory.write(e, state.ahead, state_g.step)
        return trees.emit(z_step, updates), CSERState(e, state_g, state_e)

    return as_transformation(init_fn, update_fn)
