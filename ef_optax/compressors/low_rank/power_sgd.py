"""PowerSGD: each training step takes one step of power iteration, from the last step's factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ef_optax._numeric.matrix import Matrices, orthonormal
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank._averaged_factors import (
    Averaged,
    AveragedFactors,
    Batch,
    Steps,
    averaged_factors,
    unless_zero,
)


@dataclasses.dataclass(frozen=True)
class PowerSgd(AveragedFactors):
    """``P Q^T`` with P an orthonormal basis of mean(M_i Q) and Q = mean(M_i^T P)."""

    def elements(self, matrices: Matrices, rank: int) -> float:
        return self.iterations * rank * (matrices.rows + matrices.columns)

    def rounds(self, left: int, right: int) -> tuple[int, ...]:
        return (left, right) * self.iterations

    def begin(self, matrices: Matrices, rank: int) -> dict[str, tuple[int, ...]]:
        """Q^T as (r, columns) for each matrix."""
        return {"": (*matrices.lead, rank, matrices.columns)}

    def factors(self, batches: Sequence[Batch], state: Sequence[Any]) -> Steps:
        before = Q = own = [batch.gather(state) for batch in batches]
        P = []
        for _ in range(self.iterations):
            P = yield [m.times(q) for m, q in zip(batches, Q, strict=True)]
            P = [orthonormal(p) for p in P]
            own = [m.transposed_times(p) for m, p in zip(batches, P, strict=True)]
            Q = yield own
        after = [
            batch.scatter(unless_zero(q, old))
            for batch, q, old in zip(batches, Q, before, strict=True)
        ]
        return Averaged(after, out=list(zip(P, Q, strict=True)), own=list(zip(P, own, strict=True)))


def power_sgd(
    rank: int,
    *,
    key: Any = 0,
    start_step: int = 0,
    min_compression: float = 1.0,
    iterations: int = 1,
    local_error: bool = False,
    batch_axes: int = 0,
) -> Compressor:
    """PowerSGD: low-rank factors by warm-started power iteration, averaged by two all-reduces.

    For a leaf as a matrix M_i (all but the last axis by the last axis), with Q from the last step::

        P = mean M_i Q;  P = orthonormal basis of P;  Q = mean M_i^T P;  out = P Q^T

    It is exact after one step if rank(mean M_i) <= r, but there is no contraction constant for a
    given Q. A leaf with fewer than two axes, or one that would not shrink by ``min_compression``,
    is averaged without compression. Q is part of the state, the same on all workers, and kept over
    a step with zero gradients. bfloat16 leaves are computed in float32. Leaves whose matrices have
    one shape are handled as one batch, with the same results.

    Args:
      rank: r, at most the smaller side of each matrix.
      key: a JAX random key or an int for the first Q, a standard normal matrix; the same on all
        workers.
      start_step: number of exchanges before the first compressed one, which average all leaves
        without compression (100 in the authors' package); a step executes only one of the two
        exchanges, see :func:`ef_optax.scheduled`.
      min_compression: compress a leaf only if it has more than this many times the elements
        that travel for it in a step (2 in the authors' package).
      iterations: power iterations in each step, with two rounds of communication each.
      local_error: True if error feedback keeps each worker's ``M_i - P (M_i^T P)^T``, False if it
        keeps ``M_i - out``. The results and the mean of the memories are the same, but if the
        workers' gradients differ, each memory stays small only with True. Use True with worker
        weights.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan. To stack only some leaves, use :func:`ef_optax.per_leaf`.

    Returns:
      The compressor. Bits: 32 r rows + 32 r columns, in two rounds, for each iteration.

    Raises:
      ValueError: for an option out of range; the message names it.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.power_sgd(1)
      >>> x = np.float32(np.outer([1.0, 2.0, 3.0], [2.0, 0.0, 1.0, 1.0]))
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> np.allclose(out, x, atol=1e-5), compressor.bits((3, 4))
      (True, 224)

    References:
      Vogels, Karimireddy, Jaggi, PowerSGD, 2019, Algorithm 1; ``start_step`` and
      ``min_compression`` as in epfml/powersgd, powersgd/powersgd.py.
    """
    return averaged_factors(
        "power_sgd",
        PowerSgd,
        rank,
        key=key,
        start_step=start_step,
        min_compression=min_compression,
        iterations=iterations,
        local_error=local_error,
        batch_axes=batch_axes,
    )
