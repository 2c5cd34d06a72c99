"""1-bit Adam (Tang et al. 2021): Adam at first, then error feedback on its momentum.

m_i = b1 m + (1 - b1) g_i ;  m = mean over workers: dense at first, then compressed with feedback
v = b2 v + (1 - b2) (mean_i g_i)^2 at first, then frozen
x = x - lr (m / (sqrt(v) + eps) + w x)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.quantize.rms_sign import rms_sign
from ef_optax.exchanges.two_shot import two_shot
from ef_optax.extend import (
    Array,
    AxisName,
    Compressor,
    MemoryLike,
    as_transformation,
    check,
    memory_for,
    trees,
)
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.policies.delayed_start import delayed_start


class OneBitAdamState(NamedTuple):
    """State of the scaling inside :func:`one_bit_adam`."""

    momentum: Any  # like the parameters: m, the same on all workers
    variance: Any  # like the parameters: v, the same on all workers
    feedback: Any  # an ErrorFeedbackState: what is not yet sent of the momenta, per worker


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    freeze_step: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    compressor: Compressor | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit Adam: after a dense warm-up the variance is frozen, and signs of the momentum travel.

    .. math:: m_i = b_1 m + (1 - b_1)\,g_i, \quad m' = \text{EF}(m_1, \dots, m_n), \quad
              x' = x - \eta\,(m'/(\sqrt{v} + \epsilon) + w\,x)

    With a fixed v this is momentum SGD with a preconditioner, for which error feedback works. In
    the first ``freeze_step`` steps m' is the exact mean, and v is Adam's, without bias correction
    as in the official code; the warm-up is 15 to 25% of the steps in the publication. The mean
    gradient, of which v is made, is ``(m' - b1 m)/(1 - b1)``, so that only one tree travels. All
    workers overwrite their momentum with m'.

    By default every worker is the server of a part of each leaf, with a residual of its own
    (:func:`ef_optax.exchanges.two_shot`). There each part has its own scale.

    One bit cannot represent zero. A coordinate whose v is zero, because it had no gradient in the
    warm-up (an unused row of an embedding, say), has no momentum after it either and does not move;
    the definition would divide what was sent by eps. In the official code the user gives a mask of
    these coordinates (``exp_avg_mask``). That code also applies no update in its first step.

    Args:
      learning_rate: eta, a number or a schedule.
      freeze_step: dense steps before compression, at least 1.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, decoupled.
      compressor: what is sent; None is ``ef.exchanges.two_shot(ef.rms_sign())``.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: momentum and variance, which are common, and a residual of each worker.
      Bits by default: d for the workers' parts of a leaf of d values and d/n for the server's, with
      32 for each scale.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.one_bit_adam(0.1, 1, b1=0.0, b2=0.75, compressor=ef.scaled_sign())
      >>> params, update = jnp.zeros(2), jax.jit(tx.update)
      >>> _, state = update(jnp.array([2.0, 4.0]), tx.init(params), params)
      >>> state[0].variance.tolist()
      [1.0, 4.0]
      >>> updates, _ = update(jnp.array([1.0, -3.0]), state, params)  # 2 and -2 are sent
      >>> [round(u, 6) for u in updates.tolist()]
      [-0.2, 0.1]

    References:
      Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
      Speed", ICML 2021, Algorithm 1; details as in DeepSpeed, runtime/fp16/onebit/adam.py.
    """
    check.rate("one_bit_adam", "learning_rate", learning_rate)
    check.count("one_bit_adam", "freeze_step", freeze_step)
    check.decay("one_bit_adam", "b1", b1)
    check.decay("one_bit_adam", "b2", b2)
    check.positive("one_bit_adam", "eps", eps)
    check.not_negative("one_bit_adam", "weight_decay", weight_decay)
    compressor = two_shot(rms_sign()) if compressor is None else compressor
    rule = error_feedback(
        delayed_start(compressor, freeze_step), axis_name=axis_name, memory=memory
    )
    shared = memory_for(None)

    def init_fn(params: Any) -> OneBitAdamState:
        m, v = shared.zeros(params), shared.zeros(params)
        return OneBitAdamState(momentum=m, variance=v, feedback=rule.init(m))

    def update_fn(
        updates: Any, state: OneBitAdamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, OneBitAdamState]:
        del params, extra_args
        past = trees.scale(b1, state.momentum)
        m_i = trees.axpy(1 - b1, trees.wide(updates), past)
        m, feedback = rule.update(m_i, state.feedback)
        warm = state.feedback.exchange.step < freeze_step

        def next_variance(v: Array, m: Array, past: Array) -> Array:
            g = (m - past) / (1 - b1)
            return jnp.where(warm, b2 * v + (1 - b2) * g**2, v)

        v = jax.tree.map(next_variance, state.variance, m, past)
        m = jax.tree.map(lambda m, v: jnp.where(v == 0, 0, m), m, v)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v)
        return trees.emit(step, updates), OneBitAdamState(m, v, feedback)

    return optax.chain(
        as_transformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
