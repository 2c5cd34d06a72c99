"""DCT-AdamW: Adam in the largest cosine frequencies of the gradient, with error feedback.

A_i = g_i + e_i ;  S = D A, the DCT along the shorter side ;  idx = the r largest frequencies
h = mean S_i[idx] ;  e_i = A_i - D[idx]^T S_i[idx]
m, v = Adam's moments of h; those of frequencies that were not chosen in the last step start at zero
X = X - lr (D[idx]^T m^/(sqrt(v^) + eps) + w X)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ef_optax.compressors.combine.identity import identity
from ef_optax.compressors.sparse.shared_rows import shared_rows
from ef_optax.extend import (
    Array,
    AxisName,
    IsMatrix,
    MemoryLike,
    as_transformation,
    check,
    dct_matrix,
    einsum,
    from_thin_rows,
    like_of,
    on_matrices,
    thin_rows,
    trees,
)
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback


class DctAdamWState(NamedTuple):
    """State of the frequencies inside :func:`dct_adamw`."""

    chosen: Any  # for each matrix: the numbers of the r frequencies, int32, as (matrices, r)
    momentum: Any  # m as (matrices, r, longer side), the same on all workers
    variance: Any  # v, like m
    feedback: Any  # an ErrorFeedbackState: e_i, per worker


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    is_matrix: IsMatrix | None = None,
    others: optax.GradientTransformation | None = None,
    batch_axes: int = 0,
    axis_name: AxisName = None,
    memory: MemoryLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DCT-AdamW: Adam with moments of the r largest frequencies, and feedback for the others.

    .. math:: A = g + e, \quad h = Q^T A, \quad e' = A - Q h, \quad
              \tilde m = Q^T Q_{\text{last}}\,m, \quad
              \tilde v = |Q^T Q_{\text{last}}|\,v, \quad X' = X - \eta\,Q\,\text{Adam}(h)

    Q has the r columns of the orthonormal cosine transform (DCT-II) along the shorter side of the
    matrix for which :math:`Q^T A` has the largest 1-norms. So nothing is factorised, and only the
    numbers of the columns are stored. Columns of one orthonormal basis are equal or orthogonal, so
    the moments of a frequency are kept as long as it is chosen, and are zero when it comes back.

    It saves memory on one worker too. With an axis every worker has a residual, and only the chosen
    frequencies travel; these have the largest mean norm over the workers (derived). In the official
    code gradients are averaged before, and one worker computes the step of a matrix for all. There
    projections may also be kept for several steps, and may come from other bases.

    Args:
      learning_rate: eta, a number or a schedule.
      rank: r, the number of frequencies of each matrix.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the variance, in [0, 1).
      eps: added to the square root of the variance, above 0.
      weight_decay: w, decoupled.
      is_matrix: ``is_matrix(path, leaf)`` says which leaves are projected; None for all with two or
        more axes. Leave out embeddings and heads; the official code leaves out matrices with a side
        of 32,000 or more.
      others: the optimizer of all other leaves, after a dense mean; None is AdamW with these
        options.
      batch_axes: number of leading axes of the matrices that count matrices: 1 for layers that are
        stacked for a scan.
      axis_name: the worker axis (or a tuple of axes); None for one worker.
      memory: how the residual is stored, as in :func:`ef_optax.error_feedback`; the official code
        offers 8 and 4 bits, ``ef.uniform(8, bucket=...)``.

    Returns:
      The optimizer. Memory for a matrix: r (1 + 2 longer side) numbers, and the residual. Bits: 32
      r times the longer side and 32 times the shorter one; 32 for each value of other leaves.

    Raises:
      TypeError: if ``others`` is not an Optax transformation. ValueError: for an option out of
        range.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> tx = ef.recipes.dct_adamw(0.5, rank=1, weight_decay=0.0)
      >>> params = jnp.zeros((3, 2))
      >>> updates, state = jax.jit(tx.update)(jnp.ones((3, 2)), tx.init(params), params)
      >>> # One frequency travels, the mean of each row: 0.5 / sqrt(2).
      >>> [round(u, 3) for u in updates[0].tolist()]
      [-0.354, -0.354]

    References:
      IST-DASLab/ISTA-DASLab-Optimizers, ista_daslab_optimizers/fft_low_rank/dct_adamw.py, with
      ``rotate_subspace`` and ``use_ef``.
    """
    check.rate("dct_adamw", "learning_rate", learning_rate)
    check.count("dct_adamw", "rank", rank)
    check.decay("dct_adamw", "b1", b1)
    check.decay("dct_adamw", "b2", b2)
    check.positive("dct_adamw", "eps", eps)
    check.not_negative("dct_adamw", "weight_decay", weight_decay)
    check.count("dct_adamw", "batch_axes", batch_axes, least=0)
    frequencies = shared_rows(k=rank, side="shorter", transform="dct", batch_axes=batch_axes)
    rule = error_feedback(frequencies, axis_name=axis_name, memory=memory)

    def init_fn(params: Any) -> DctAdamWState:
        def zeros(x: Array) -> tuple[Array, Array, Array]:
            number, a, b = jax.eval_shape(lambda x: thin_rows(x, batch_axes), x).shape
            r, dtype = min(rank, a), trees.widest(x)
            m, v = jnp.zeros((number, r, b), dtype), jnp.zeros((number, r, b), dtype)
            return jnp.zeros((number, r), jnp.int32), m, v

        parts = trees.map_several(zeros, params) if jax.tree.leaves(params) else ((), (), ())
        chosen, m, v = parts
        return DctAdamWState(chosen, m, v, rule.init(params))

    def update_fn(
        updates: Any, state: DctAdamWState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DctAdamWState]:
        del params, extra_args
        before: Any = state.feedback
        mean, feedback = rule.update(trees.wide(updates), before)

        def one(x: Array, last: Array, m: Array, v: Array) -> tuple[Array, Array, Array, Array]:
            rows = thin_rows(x, batch_axes)
            D = jnp.asarray(dct_matrix(rows.shape[1]), rows.dtype)
            S = einsum("fa,nab->nfb", D, rows)
            _, chosen = jax.lax.top_k(jnp.sum(jnp.abs(S), axis=-1), m.shape[1])
            h = jnp.take_along_axis(S, chosen[..., None], axis=1)
            kept = (chosen[:, :, None] == last[:, None, :]).astype(h.dtype)  # Q^T Q_last
            m = b1 * einsum("nij,njb->nib", kept, m) + (1 - b1) * h
            v = b2 * einsum("nij,njb->nib", kept, v) + (1 - b2) * h**2
            t = (before.exchange.step + 1).astype(h.dtype)
            direction = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
            step = einsum("nra,nrb->nab", D[chosen], direction)
            return from_thin_rows(step, like_of(x), batch_axes), chosen, m, v

        if not jax.tree.leaves(updates):
            return updates, state._replace(feedback=feedback)
        moments = state.momentum, state.variance
        step, chosen, m, v = trees.map_several(one, mean, state.chosen, *moments)
        return trees.emit(step, updates), DctAdamWState(chosen, m, v, feedback)

    matrices = optax.chain(
        as_transformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    if others is None:
        others = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    check.transformation("dct_adamw", "others", others)
    dense = optax.chain(compressed_mean(identity(), axis_name=axis_name), others)
    return on_matrices(matrices, dense, is_matrix)
