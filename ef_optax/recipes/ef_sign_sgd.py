"""EF-signSGD (Karimireddy, Rebjock, Stich, Jaggi 2019): one bit a value, and nothing is lost.

p_i = lr g_i + e_i ;  D_i = (||p_i||_1 / d) sign(p_i) ;  e_i = p_i - D_i
x = x - mean_i D_i
"""

from __future__ import annotations

import optax

from ef_optax.compressors.quantize.scaled_sign import scaled_sign
from ef_optax.extend import AxisName, Compressor, MemoryLike, check
from ef_optax.feedback.ef14 import error_feedback


def ef_sign_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    compressor: Compressor | None = None,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF-signSGD: error feedback of the step, with scaled signs.

    .. math:: p_i = \eta g_i + e_i, \quad D_i = \tfrac{\|p_i\|_1}{d}\,\text{sign}(p_i), \quad
              e_i' = p_i - D_i, \quad x' = x - \text{mean}_i\,D_i

    The residual is in step units, so that after a change of the rate it is applied as it is. Every
    leaf has its own scale, as in the paper's experiments. Weight decay in the gradient, as there,
    is ``optax.add_decayed_weights`` before the recipe.

    Args:
      learning_rate: eta, a number or a schedule.
      compressor: what is sent instead of scaled signs; ``ef.row_sign()`` has a scale for each row
        of an embedding, and with ``ef.per_leaf`` some leaves travel dense.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one residual. Bits with scaled signs: d + 32 for a leaf of d values.

    Raises:
      TypeError: if ``compressor`` is not a Compressor. ValueError: for a bad learning rate; at
        init, for a compressor that makes the residual grow.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.recipes.ef_sign_sgd(0.5)
      >>> updates, state = tx.update(jnp.array([6.0, -2.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist(), state[1].residual.tolist()
      ([-2.0, 2.0], [1.0, 1.0])

    References:
      Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other Gradient
      Compression Schemes", ICML 2019, Algorithm 1; several workers as in its Algorithm 2.
    """
    check.rate("ef_sign_sgd", "learning_rate", learning_rate)
    compressor = scaled_sign() if compressor is None else compressor
    return optax.chain(
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        error_feedback(compressor, axis_name=axis_name, memory=memory),
        optax.scale(-1.0),
    )
