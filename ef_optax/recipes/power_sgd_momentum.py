"""PowerSGD with error feedback and momentum (Vogels, Karimireddy, Jaggi 2019, Algorithm 2).

p_i = g_i + e_i ;  D = low-rank mean of p_i ;  e_i = p_i - D
u = D + w x ;  m = b m + u ;  x = x - lr (u + m)
"""

from __future__ import annotations

from typing import Any

import optax

from ef_optax.compressors.low_rank.power_sgd import power_sgd
from ef_optax.extend import AxisName, MemoryLike, as_key, check, plus
from ef_optax.feedback.ef14 import error_feedback


def power_sgd_momentum(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    key: Any = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""PowerSGD as its paper trains: error feedback before the all-reduce, momentum after it.

    .. math:: D = \text{PowerSGD}(g_i + e_i), \quad e_i' = g_i + e_i - D, \quad u = D + w x, \quad
              m' = b\,m + u, \quad x' = x - \eta\,(u + m')

    The momentum is of what all workers have received, so it is the same on all of them. The step
    u + m' is that of Algorithm 2 and of the authors' code; it is not Nesterov's u + b m' of other
    libraries, and in the long run it is ``1/(1 - b) + 1`` times u, so that a rate for
    ``optax.sgd`` with b = 0.9 is 10% too large. Leaves with fewer than two axes travel dense. In
    the authors' experiments biases have weight decay and batch normalisation has not.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: r of each matrix, at least 1.
      momentum: b in [0, 1).
      weight_decay: w, added after the all-reduce and before momentum.
      key: for the first factors.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: the residual, which differs between workers, momentum and a factor.
      Bits: 32 r (rows + columns) for a matrix.

    Raises:
      TypeError: if ``key`` is not a random key. ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.recipes.power_sgd_momentum(0.5, rank=1)
      >>> params = jnp.zeros(2)  # a vector travels dense
      >>> tx.update(jnp.array([1.0, 2.0]), tx.init(params), params)[0].tolist()
      [-1.0, -2.0]

    References:
      Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
      Optimization", NeurIPS 2019, Algorithm 2; epfml/powersgd, paper-code/train.py for weight
      decay.
    """
    check.rate("power_sgd_momentum", "learning_rate", learning_rate)
    check.count("power_sgd_momentum", "rank", rank)
    check.decay("power_sgd_momentum", "momentum", momentum)
    check.not_negative("power_sgd_momentum", "weight_decay", weight_decay)
    compressor = power_sgd(rank, key=as_key(key, "power_sgd_momentum"))
    return optax.chain(
        error_feedback(compressor, axis_name=axis_name, memory=memory),
        optax.add_decayed_weights(weight_decay),
        plus(optax.trace(momentum)),
        optax.scale_by_learning_rate(learning_rate),
    )
