"""Trion: Muon on the largest cosine frequencies of the momentum.

M_i = M_i + g_i ;  S = M D^T, the DCT along the shorter side ;  idx = the r largest columns of S
m = S[:, idx] ;  Q = D^T[:, idx]
M_i = M_i - (1 - mu) m Q^T
X = X - lr (sqrt(d_out / d_in) NS(m) Q^T + w X)
"""

from __future__ import annotations

import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.sparse.shared_rows import shared_rows
from ef_optax.extend import AxisName, IsMatrix, MemoryLike, check, on_matrices
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.momentum_feedback import momentum_feedback
from ef_optax.recipes.orthogonalise import orthogonalise, spectral_scale


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    is_matrix: IsMatrix | None = None,
    others: optax.GradientTransformation | None = None,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trion: the largest frequencies of the momentum are orthonormalised and decay.

    .. math:: S = M'D^T, \quad m = S_{:,\,\text{idx}}, \quad Q = D^T_{:,\,\text{idx}}, \quad
              M'' = M' - (1 - \mu)\,m Q^T, \quad
              X' = X - \eta \sqrt{d_\text{out}/d_\text{in}}\,\text{NS}(m) Q^T

    D is the orthonormal cosine transform (DCT-II) along the shorter side, and idx are the r
    frequencies of the largest 1-norm. It is Dion with a fixed basis, of which the best columns are
    chosen, so that nothing is factorised and no basis is stored: :func:`ef_optax.momentum_feedback`
    with ``ef.shared_rows(k=rank, transform="dct")``, then :func:`orthogonalise`. Because Q has
    orthonormal columns, NS(m) Q^T is NS(m Q^T); the official code iterates on the small m.

    With an axis every worker keeps a momentum of its own, and only the chosen frequencies travel;
    these have the largest mean norm over the workers (derived). In the official code gradients are
    averaged before, and each step of a matrix is computed by one worker for all.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: r, the number of frequencies of each matrix.
      momentum: mu in [0, 1), the decay of what was sent.
      weight_decay: w, decoupled.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are updated in this way; None for all
        with two or more axes. Leave out embeddings and heads, as the official code does.
      others: the optimizer of all other leaves, after a dense mean; None is AdamW with the same
        rate and weight decay, and b = (0.9, 0.95).
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the momentum is stored, as in :func:`ef_optax.error_feedback`.

    Returns:
      The optimizer. Memory: one momentum for a matrix, which differs between workers. Bits: 32 r
      times the longer side and 32 times the shorter one, and 32 for each value of other leaves.

    Raises:
      TypeError: if ``others`` is not an Optax transformation. ValueError: for an option out of
        range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.trion(0.1, rank=1, weight_decay=0.0)
      >>> params = jnp.zeros((3, 2))
      >>> updates, state = jax.jit(tx.update)(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.all(updates < 0)), bool(jnp.all(updates == updates[0, 0]))
      (True, True)

    References:
      IST-DASLab/ISTA-DASLab-Optimizers, ista_daslab_optimizers/fft_low_rank/trion.py, whose other
      choices of the scale are ``optax.scale`` after the recipe.
    """
    check.rate("trion", "learning_rate", learning_rate)
    check.count("trion", "rank", rank)
    check.decay("trion", "momentum", momentum)
    check.not_negative("trion", "weight_decay", weight_decay)
    check.count("trion", "batch_axes", batch_axes, least=0)
    frequencies = shared_rows(k=rank, side="shorter", transform="dct", batch_axes=batch_axes)
    matrices = optax.chain(
        momentum_feedback(frequencies, momentum, axis_name=axis_name, memory=memory),
        orthogonalise(batch_axes=batch_axes),
        spectral_scale(batch_axes=batch_axes),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    if others is None:
        others = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay)
    check.transformation("trion", "others", others)
    dense = optax.chain(compressed_mean(identity(), axis_name=axis_name), others)
    return on_matrices(matrices, dense, is_matrix)
