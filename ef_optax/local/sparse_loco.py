"""SparseLoCo (Sarfi et al. 2025): local steps, and error feedback in place of outer momentum.

every step:     x_i = x_i + Inner(grad f_i(x_i))
every H steps:  e_i = b e_i + x - x_i ;  c_i = Q(TopK(e_i)) ;  e_i = e_i - c_i
                x = x - a Agg(c_1, ..., c_n) ;  x_i = x
"""

from __future__ import annotations

from typing import Literal

import optax

from ef_optax.exchanges.senders import mean_of_senders
from ef_optax.extend import AxisName, Compressor, MemoryLike, check
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.local.local_steps import local_steps


def sparse_loco(
    inner: optax.GradientTransformation,
    period: int,
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    decay: float = 0.95,
    *,
    mean: Literal["senders", "workers"] = "senders",
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SparseLoCo: H local steps, then a sparse message of the drift with a decaying memory.

    .. math:: e_i' = b\,e_i + x - x_i, \quad c_i = C(e_i'), \quad e_i'' = e_i' - c_i, \quad
              x' = x - a\,\text{Agg}(c_1, \dots, c_n)

    There is no outer momentum; the decaying memory plays its part. Agg is the mean over all workers
    in the paper. In all public code it is, for each coordinate, the mean over the workers that sent
    it (:func:`ef_optax.exchanges.mean_of_senders`), which is the default here: at a density of 1/64
    and 16 workers it is up to 14 times as long, so a rate that was tuned for one form does not suit
    the other. With ``mean="workers"``, a compressor that sends everything and b = 0 it is DiLoCo
    without momentum.

    Args:
      inner: the optimizer of the local steps, ``optax.adamw(...)`` in the publication.
      period: H; 15 to 250 in the publication, 30 in production.
      compressor: C. The publication's is close to
        ``ef.compose(ef.sigma_bins(2), ef.block_top_k(k=64, block=4096))``; its blocks are tiles of
        64 x 64 values, these are 4,096 consecutive ones.
      learning_rate: a, a number or a schedule of the synchronisations.
      decay: b in [0, 1].
      mean: over which workers a coordinate is averaged.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: the dtype of x_i - x and of the residual, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer; its state is a :class:`LocalStepsState`. It stores the residual times b.

    Raises:
      TypeError: if ``inner`` is not an Optax transformation, or ``compressor`` not a Compressor.
        ValueError: for an option out of range, or a compressor without indices if the mean is over
        the senders.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp, optax
      >>> tx = ef.local.sparse_loco(optax.sgd(1.0), 1, ef.top_k(k=1), axis_name="w")
      >>> tx = ef.simulate(tx, 2, "w")
      >>> grads, params = jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.zeros(2)
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [-3.0, -4.0]

    References:
      Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", 2025, and its code,
      tplr-ai/CCLoco: src/tplr/ccloco.py, which also multiplies the drift by a before it is sent.
    """
    check.count("sparse_loco", "period", period)
    check.share("sparse_loco", "decay", decay)
    check.rate("sparse_loco", "learning_rate", learning_rate)
    check.word("sparse_loco", "mean", mean, ("senders", "workers"))
    sent = mean_of_senders(compressor) if mean == "senders" else compressor
    rule = error_feedback(sent, axis_name=axis_name, decay=decay, memory=memory)
    outer = optax.chain(rule, optax.sgd(learning_rate))
    return local_steps(inner, period, outer, memory=memory)
