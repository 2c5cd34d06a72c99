"""The orthonormalised factors of Dion: one step of power iteration, and an update of rank r.

P = orthonormal basis of mean(M_i Q) ;  R = mean(M_i^T P) ;  sent: P R^T
Q = R with columns of length 1 ;  aggregate: P Q^T
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.matrix import Matrices, matrix_view, orthonormal
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank._averaged_factors import (
    Averaged,
    AveragedFactors,
    Batch,
    Steps,
    unless_zero,
)


@dataclasses.dataclass(frozen=True)
class DionFactors(AveragedFactors):
    """``P Q^T`` with orthonormal P and Q with columns of length 1, from the mean matrix."""

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, homogeneous=False, additive=False)

    def plan(self, shape: Shape) -> tuple[Matrices, int] | None:
        """Every matrix has factors, also one that they do not make smaller."""
        matrices = matrix_view(shape, self.batch_axes)
        if matrices is None:
            return None
        return matrices, min(self.rank, matrices.rows, matrices.columns)

    def elements(self, matrices: Matrices, rank: int) -> float:
        return rank * (matrices.rows + matrices.columns)

    def rounds(self, left: int, right: int) -> tuple[int, ...]:
        return left, right

    def begin(self, matrices: Matrices, rank: int) -> dict[str, tuple[int, ...]]:
        """Q^T as (r, columns) for each matrix."""
        return {"": (*matrices.lead, rank, matrices.columns)}

    def factors(self, batches: Sequence[Batch], state: Sequence[Any]) -> Steps:
        before = [batch.gather(state) for batch in batches]
        P = yield [m.times(q) for m, q in zip(batches, before, strict=True)]
        P = [orthonormal(p) for p in P]
        R = yield [m.transposed_times(p) for m, p in zip(batches, P, strict=True)]
        Q = [r / safe_divisor(jnp.linalg.norm(r, axis=-1, keepdims=True)) for r in R]
        after = [
            batch.scatter(unless_zero(q, old))
            for batch, q, old in zip(batches, Q, before, strict=True)
        ]
        return Averaged(after, out=list(zip(P, Q, strict=True)), own=list(zip(P, R, strict=True)))


def dion_factors(rank: int, *, key: Any = 0, batch_axes: int = 0) -> Compressor:
    r"""Dion's update of rank r: the part of the mean in a warm-started basis, orthonormalised.

    .. math:: P = \text{orth}(\text{mean}_i\,M_i Q), \quad R = \text{mean}_i\,M_i^T P, \quad
              Q' = R\,\text{diag}(1/\|R_j\|), \quad \text{sent } P R^T, \quad \text{out } P Q'^T

    What all workers apply (P Q^T) is not what a memory loses (P R^T), so it is for
    :func:`momentum_feedback`, which uses both. Q starts as a standard normal matrix, the same on
    all workers, and stays as it is in a step with zero gradients. P is orthonormal; Q only has
    columns of length 1, so P Q^T has singular values of 1 only once the basis has settled.

    A leaf with fewer than two axes is averaged without compression.

    Args:
      rank: r, at most the smaller side of each matrix.
      key: a JAX random key or an int for the first Q.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: 32 r rows + 32 r columns, in two rounds.

    Raises:
      ValueError: for an option out of range. TypeError: if ``key`` is not a random key.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.dion_factors(1)
      >>> x = np.float32(7 * np.outer([0.6, 0.8], [0.0, 1.0, 0.0]))
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> np.allclose(out, x / 7, atol=1e-6), compressor.bits((2, 3))
      (True, 160)

    References:
      Ahn et al., "Dion: Distributed Orthonormalized Updates", 2025; microsoft/dion,
      dion/dion_simple.py, where a zero gradient makes Q zero for ever.
    """
    check.count("dion_factors", "rank", rank)
    check.count("dion_factors", "batch_axes", batch_axes, least=0)
    typed = as_key(key, "dion_factors")
    codec = DionFactors(
        rank, key if isinstance(key, int) else typed, local_error=True, batch_axes=batch_axes
    )
    return Compressor(codec)
