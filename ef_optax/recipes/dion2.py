"""Dion2 (Ahn et al. 2025): Muon on the largest rows of the momentum.

M_i = M_i + g_i ;  S = the share of rows (or columns, whichever are fewer) of the largest 1-norm
U = M_S ;  M_S = mu M_S                                 the rest of the momentum waits undiminished
X = X - lr (sqrt(d_out / d_in) NS(U) at S + w X)
"""

from __future__ import annotations

import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.sparse.shared_rows import shared_rows
from ef_optax.extend import AxisName, IsMatrix, MemoryLike, check, on_matrices
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.momentum_feedback import momentum_feedback
from ef_optax.recipes.orthogonalise import orthogonalise, spectral_scale


def dion2(
    learning_rate: optax.ScalarOrSchedule,
    fraction: float = 0.25,
    *,
    momentum: float = 0.95,
    parts: int = 1,
    weight_decay: float = 0.01,
    is_matrix: IsMatrix | None = None,
    others: optax.GradientTransformation | None = None,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Dion2: the largest rows of the momentum are orthonormalised and decay; the others wait.

    .. math:: M' = M + G, \quad S = \text{rows of largest } \|M'_r\|_1, \quad
              M''_S = \mu M'_S, \quad
              X'_S = X_S - \eta \sqrt{d_\text{out}/d_\text{in}}\,\text{NS}(M'_S)

    It is :func:`ef_optax.momentum_feedback` with :func:`ef_optax.shared_rows`, then
    :func:`orthogonalise` of what was sent. With ``fraction=1`` it is Muon with the momentum
    M = mu M + G. Rows are chosen if there are fewer of them, else columns (of a square matrix the
    outputs).

    With an axis every worker keeps a momentum of its own, and only the chosen rows travel; these
    are the rows of the largest mean norm over the workers (derived). In the official code the
    gradients are averaged before, so that all momenta are equal: for that, put
    ``ef.compressed_mean(ef.identity(), axis_name=...)`` before the recipe and give it no axis.

    Its ``scope="local"``, which chooses the same number of rows on every shard of a matrix, is
    ``parts``; ``parts=1`` is its global scope, which follows Muon more closely. The iteration is
    that of Optax's Muon in float32, where the official code takes other coefficients in bfloat16.

    Args:
      learning_rate: eta, a number or a schedule.
      fraction: the share of the rows that is updated in a step, in (0, 1].
      momentum: mu in [0, 1), the decay of what was sent.
      parts: number of equal parts of the rows, of each of which this share is chosen.
      weight_decay: w, decoupled, of all rows in every step.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are updated in this way; None for all
        with two or more axes. Leave out embeddings and heads, as the official code does.
      others: the optimizer of all other leaves, after a dense mean; None is AdamW with the same
        rate and weight decay, and b = (0.9, 0.95).
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the momentum is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one momentum for a matrix, which differs between workers. Bits: those
      of ``ef.shared_rows(fraction)``, and 32 for each value of the other leaves.

    Raises:
      TypeError: if ``others`` is not an Optax transformation. ValueError: for an option out of
        range; at init, if ``parts`` does not divide the rows of a matrix.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.dion2(0.1, 0.5, weight_decay=0.0)
      >>> params = jnp.zeros((2, 3))
      >>> g = jnp.array([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
      >>> updates, state = jax.jit(tx.update)(g, tx.init(params), params)
      >>> bool(jnp.all(updates[0] == 0)), bool(updates[1, 0] < -0.05)  # the first row waits
      (True, True)

    References:
      Ahn et al., "Dion2", 2025 (arXiv 2512.16928); microsoft/dion, dion/dion2.py.
    """
    check.rate("dion2", "learning_rate", learning_rate)
    check.ratio("dion2", "fraction", fraction)
    check.decay("dion2", "momentum", momentum)
    check.count("dion2", "parts", parts)
    check.not_negative("dion2", "weight_decay", weight_decay)
    check.count("dion2", "batch_axes", batch_axes, least=0)
    rows = shared_rows(fraction, side="shorter", parts=parts, batch_axes=batch_axes)
    matrices = optax.chain(
        momentum_feedback(rows, momentum, axis_name=axis_name, memory=memory),
        orthogonalise(nonzero=fraction, parts=parts, batch_axes=batch_axes),
        spectral_scale(batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    if others is None:
        others = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay)
    check.transformation("dion2", "others", others)
    dense = optax.chain(compressed_mean(identity(), axis_name=axis_name), others)
    return on_matrices(matrices, dense, is_matrix)
