"""EControl with dual averaging (Gao, Rodomanov, Rack, Stich 2026): feedback for f + psi.

D_i = C(eta e_i + g_i - h_i) ;  e_i = e_i + g_i - h_i - D_i ;  h_i = h_i + D_i
x = argmin_x  sum_k a_k (<mean_i h_i^k, x> + psi(x)) + (gamma_t / 2) ||x - x_0||^2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from ef_optax.extend import AxisName, Compressor, MemoryLike, check, difference
from ef_optax.feedback.econtrol import econtrol
from ef_optax.recipes.dual_averaging import dual_averaging


def econtrol_dual_averaging(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    strength: float,
    prox: Callable[[Any, Any], Any] | None = None,
    *,
    step_weight: optax.ScalarOrSchedule = 1.0,
    axis_name: AxisName = None,
    init: difference.Init = "compressed",
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EControl before dual averaging: error feedback with a regulariser or a constraint.

    .. math:: D_i = C(\eta e_i + g_i - h_i), \quad e_i' = e_i + g_i - h_i - D_i, \quad
              h_i' = h_i + D_i, \quad x' = \text{prox}_{A\psi/\gamma_t}\!\left(x_0 -
              \tfrac{1}{\gamma_t} \textstyle\sum_k a_k\,\text{mean}_i\,h_i^k\right)

    Error feedback repairs a sum of steps, and proximal steps are no sum. Dual averaging keeps the
    sum, so what is sent late still counts in full. It is the chain of :func:`ef_optax.econtrol` and
    :func:`dual_averaging`; the publication's e_i has the other sign.

    Args:
      compressor: what is sent; contractive, such as ``ef.top_k(0.01)``.
      learning_rate: 1/gamma_t, at least 0: a number or a schedule of the steps.
      strength: eta; :func:`ef_optax.theory.econtrol_strength` is the publication's.
      prox: ``prox(params, step)``, the proximal operator of ``step * psi``, for example
        :func:`ef_optax.l1_prox`; None for psi = 0.
      step_weight: a_t, at least 0: a number or a schedule of the steps.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      init: the first estimates, as in :func:`ef_optax.ef21`.
      memory: how residual and estimates are stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; no transformation after it may change the updates. Memory: a residual and an
      estimate per worker, and the mean estimate, the start and the sum, which are common.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: as for
        :func:`ef_optax.econtrol` and :func:`dual_averaging`.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.recipes.econtrol_dual_averaging(ef.top_k(k=1), 0.5, 0.1, ef.l1_prox(1.0))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([-4.0, 2.0]), tx.init(params), params)
      >>> updates.tolist(), state[0].residual.tolist()
      ([1.5, 0.0], [0.0, 2.0])

    References:
      Gao, Rodomanov, Rack, Stich, "Composite Optimization with Error Feedback: the Dual Averaging
      Approach", ICLR 2026 (arXiv 2510.03507), by a summary of its algorithm.
    """
    check.rate("econtrol_dual_averaging", "learning_rate", learning_rate)
    check.not_negative("econtrol_dual_averaging", "strength", strength)
    check.rate("econtrol_dual_averaging", "step_weight", step_weight)
    check.word("econtrol_dual_averaging", "init", init, difference.INITS)
    return optax.with_extra_args_support(
        optax.chain(
            econtrol(compressor, strength, axis_name=axis_name, init=init, memory=memory),
            dual_averaging(learning_rate, prox, step_weight=step_weight),
        )
    )
