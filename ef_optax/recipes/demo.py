"""DeMo (Peng, Quesnelle, Kingma 2024): the fast components of momentum travel, the rest stays.

d_i = b d_i + lr g_i ;  q_i = k largest cosine coefficients of each tile of d_i ;  d_i = d_i - q_i
x = x - lr (sign(mean of each coefficient over its senders) + w x)
"""

from __future__ import annotations

import optax

from ef_optax.compressors.sparse.dct_top_k import dct_top_k
from ef_optax.exchanges.senders import mean_of_senders
from ef_optax.extend import AxisName, MemoryLike, check
from ef_optax.feedback.ef14 import error_feedback


def demo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.999,
    k: int = 32,
    chunk: int = 64,
    weight_decay: float = 0.0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DeMo: momentum that is never averaged, of which a few cosine coefficients are sent.

    .. math:: d_i' = b\,d_i + \eta g_i, \quad q_i = \text{top-}k(\text{DCT of } d_i'), \quad
              d_i'' = d_i' - q_i, \quad
              x' = x - \eta\,(\text{sign}(\text{mean of senders } q) + w x)

    The momentum is at the same time the residual of what was not sent, so it is error feedback of
    the step with retention b (:func:`ef_optax.error_feedback`). Every matrix is cut into tiles,
    whose sides are the largest divisors of its own up to ``chunk``; vectors are cut too, and no
    leaf is treated differently. Each coefficient is averaged over the workers that sent it, then
    the mean is transformed back and its sign taken, so that all coordinates of a tile move by the
    rate as soon as one of its coefficients was sent.

    For a constant rate the units of d do not matter, since the step is a sign.

    Args:
      learning_rate: eta, a number or a schedule; as small as that of a sign method.
      decay: b in [0, 1].
      k: coefficients sent of each tile.
      chunk: the largest side of a tile.
      weight_decay: w, decoupled.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how b d_i is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one residual, which differs between workers. Bits: those of
      ``ef.dct_top_k(chunk, k)``, k (32 + 12) for each tile of 64 x 64.

    Raises:
      ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.demo(0.5, k=1, chunk=2)
      >>> params = jnp.zeros(2)
      >>> updates, state = jax.jit(tx.update)(jnp.array([3.0, 1.0]), tx.init(params), params)
      >>> updates.tolist()  # the mean of the tile was sent, not the difference
      [-0.5, -0.5]

    References:
      Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", 2024; the mean over the
      senders as in its code, bloc97/DeMo, demo.py, which fails for leaves of more than two axes and
      does not store d in checkpoints.
    """
    check.rate("demo", "learning_rate", learning_rate)
    check.share("demo", "decay", decay)
    check.count("demo", "k", k)
    check.count("demo", "chunk", chunk)
    check.not_negative("demo", "weight_decay", weight_decay)
    sent = mean_of_senders(dct_top_k(chunk, k))
    return optax.chain(
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        error_feedback(sent, axis_name=axis_name, decay=decay, memory=memory),
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
