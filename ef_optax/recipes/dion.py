"""Dion (Ahn et al. 2025): low-rank orthonormal steps, with momentum as the residual.

B_i = M_i + g_i ;  P = orth(mean_i B_i Q) ;  R = mean_i B_i^T P ;  M_i = B_i - (1 - mu) P R^T
Q = R with columns of length 1
X = X - lr (sqrt(d_out / d_in) P Q^T + w X)
"""

from __future__ import annotations

from typing import Any

import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.low_rank.dion_factors import dion_factors
from ef_optax.extend import AxisName, IsMatrix, MemoryLike, as_key, check, on_matrices
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.momentum_feedback import momentum_feedback
from ef_optax.recipes.orthogonalise import spectral_scale


def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    is_matrix: IsMatrix | None = None,
    others: optax.GradientTransformation | None = None,
    key: Any = 0,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Dion: the step is an orthonormal matrix of rank r, and only two thin factors travel.

    .. math:: B = M + G, \quad P = \text{orth}(BQ), \quad R = B^T P, \quad
              M' = B - (1 - \mu) P R^T, \quad Q' = R\,\text{diag}(1/\|R_j\|), \quad
              X' = X - \eta \sqrt{d_\text{out}/d_\text{in}}\,P Q'^T

    It is :func:`ef_optax.momentum_feedback` with :func:`ef_optax.dion_factors`: what the factors
    catch of the momentum decays by mu, the rest waits. Every worker keeps a momentum of its own,
    and two all-reduces make the factors of the mean. With full rank the next momentum is
    mu (M + G). The authors recommend its successor :func:`dion2`.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: r of each matrix, at least 1.
      momentum: mu in [0, 1), the decay of what was sent.
      weight_decay: w, decoupled.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are updated in this way; None for all
        with two or more axes. Leave out embeddings and heads, as the official code does.
      others: the optimizer of all other leaves, after a dense mean; None is AdamW with the same
        rate and weight decay, and b = (0.9, 0.95).
      key: for the first factors.
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the momentum is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one momentum for a matrix, which differs between workers, and a factor.
      Bits: 32 r (rows + columns) for a matrix, and 32 for each value of the other leaves.

    Raises:
      TypeError: if ``key`` is not a random key, or ``others`` not an Optax transformation.
        ValueError: for an option out of range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.dion(0.5, rank=1, weight_decay=0.0)
      >>> params = jnp.zeros((2, 2))
      >>> g = jnp.array([[0.0, 3.0], [0.0, 0.0]])
      >>> updates, state = jax.jit(tx.update)(g, tx.init(params), params)
      >>> abs(updates).round(4).tolist()
      [[0.0, 0.5], [0.0, 0.0]]

    References:
      Ahn et al., "Dion: Distributed Orthonormalized Updates", 2025; microsoft/dion,
      dion/dion_simple.py.
    """
    check.rate("dion", "learning_rate", learning_rate)
    check.count("dion", "rank", rank)
    check.decay("dion", "momentum", momentum)
    check.not_negative("dion", "weight_decay", weight_decay)
    check.count("dion", "batch_axes", batch_axes, least=0)
    factors = dion_factors(rank, key=as_key(key, "dion"), batch_axes=batch_axes)
    matrices = optax.chain(
        momentum_feedback(factors, momentum, axis_name=axis_name, memory=memory),
        spectral_scale(batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    if others is None:
        others = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay)
    check.transformation("dion", "others", others)
    dense = optax.chain(compressed_mean(identity(), axis_name=axis_name), others)
    return on_matrices(matrices, dense, is_matrix)
