"""ACP-SGD: PowerSGD that sends only one of its two factors in a step, in turn.

even steps   Q = orthonormal basis of Q ;  P_i = M_i Q ;    P = mean P_i ;  out = P Q^T
odd steps    P = orthonormal basis of P ;  Q_i = M_i^T P ;  Q = mean Q_i ;  out = P Q^T
error        e_i = M_i - P_i Q^T, or M_i - P Q_i^T
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from ef_optax._core.policy import Stage, Stages, StepPolicy
from ef_optax._core.timeline import Timeline
from ef_optax._numeric.dtypes import Array
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


class FactorsState(NamedTuple):
    """State of :func:`acp_sgd` for one leaf; () for a dense one."""

    P: Array  # (rows, r) for each matrix: the last mean of the left factor
    Q: Array  # (r, columns) for each matrix: the last mean of the right factor, transposed


@dataclasses.dataclass(frozen=True)
class AcpSgd(AveragedFactors, StepPolicy):
    """One factor per half-iteration; ``side`` is the factor that comes first in this step."""

    side: int = 0  # 0 if P is computed first, 1 if Q is

    def elements(self, matrices: Matrices, rank: int) -> float:
        return self.iterations * rank * (matrices.rows + matrices.columns) / 2

    def rounds(self, left: int, right: int) -> tuple[int, ...]:
        """Bits of each round of this step; after an odd number of halves the sides are swapped."""
        return tuple((left, right)[(self.side + half) % 2] for half in range(self.iterations))

    @property
    def stages(self) -> Stages:
        """The first side changes from step to step, unless the number of halves is even."""
        left, right = (Stage(dataclasses.replace(self, side=side)) for side in (0, 1))
        if self.iterations % 2 == 0:
            return Stages(Timeline(), (left,))
        return Stages(Timeline((1, 2), 0, 2), (left, right))

    def begin(self, matrices: Matrices, rank: int) -> dict[str, tuple[int, ...]]:
        lead, rows, columns = matrices
        return {" P": (*lead, rows, rank), " Q": (*lead, rank, columns)}

    def state_of(self, *factors: Array) -> FactorsState:
        return FactorsState(*factors)

    def factors(self, batches: Sequence[Batch], state: Sequence[Any]) -> Steps:
        kept = [
            FactorsState(*(b.gather({i: state[i][j] for i in b.members}) for j in range(2)))
            for b in batches
        ]
        out: list[list[FactorsState]] = [[] for _ in batches]
        own: list[list[FactorsState]] = [[] for _ in batches]
        rest = batches
        for half in range(self.iterations):
            left = (self.side + half) % 2 == 0
            mine = [_half(b, f, left) for b, f in zip(rest, kept, strict=True)]
            averaged = yield [f.P if left else f.Q for f in mine]
            applied = [
                f._replace(P=mean) if left else f._replace(Q=mean)
                for f, mean in zip(mine, averaged, strict=True)
            ]
            kept = [
                FactorsState(unless_zero(new.P, old.P), unless_zero(new.Q, old.Q))
                for new, old in zip(applied, kept, strict=True)
            ]
            sent = mine if self.local_error else applied
            rest = [b.minus(*f) for b, f in zip(rest, sent, strict=True)]
            for i in range(len(batches)):
                out[i].append(applied[i])
                own[i].append(mine[i])
        after = [
            [FactorsState(*pair) for pair in zip(b.scatter(f.P), b.scatter(f.Q), strict=True)]
            for b, f in zip(batches, kept, strict=True)
        ]
        return Averaged(
            after,
            out=[_side_by_side(factors) for factors in out],
            own=[_side_by_side(factors) for factors in own],
        )


def _half(batch: Batch, kept: FactorsState, left: bool) -> FactorsState:
    """Makes one factor orthonormal, and computes this worker's best other factor for it."""
    if left:
        Q = jnp.swapaxes(orthonormal(jnp.swapaxes(kept.Q, -2, -1)), -2, -1)
        return FactorsState(batch.times(Q), Q)
    P = orthonormal(kept.P)
    return FactorsState(P, batch.transposed_times(P))


def _side_by_side(factors: list[FactorsState]) -> tuple[Array, Array]:
    """Several products as one: ``P_1 Q_1 + P_2 Q_2 + ...``."""
    if len(factors) == 1:
        return factors[0]
    P, Q = ([f[j] for f in factors] for j in range(2))
    return jnp.concatenate(P, axis=-1), jnp.concatenate(Q, axis=-2)


def acp_sgd(
    rank: int,
    *,
    key: Any = 0,
    start_step: int = 0,
    min_compression: float = 1.0,
    iterations: int = 1,
    local_error: bool = True,
    batch_axes: int = 0,
) -> Compressor:
    """ACP-SGD: PowerSGD with one factor per step, so one all-reduce and half the traffic.

    For a leaf as a matrix M_i, with the factor that the last step averaged::

        even steps:  Q = orthonormal basis of Q;  P = mean M_i Q;    out = P Q^T
        odd steps:   P = orthonormal basis of P;  Q = mean M_i^T P;  out = P Q^T

    Two steps make one power iteration of :func:`ef_optax.power_sgd`. ``out`` is the projection of
    mean M_i on the span of the orthonormal factor, so ``||M - out|| <= ||M||``, but there is no
    contraction constant for a given factor. After two steps with the same M of rank at most r, it
    is exact. Dense leaves, zero gradients and batches are handled as in ``power_sgd``.

    Args:
      rank: r, at most the smaller side of each matrix.
      key: a JAX random key or an int for the first factors, which are standard normal; the same on
        all workers.
      start_step: number of exchanges before the first compressed one, which average all leaves
        without compression.
      min_compression: compress a leaf only if it has more than this many times the elements
        that travel for it in a step, on average (2 in the package of PowerSGD's authors).
      iterations: half-iterations in each step, one round each; each compresses what the last one
        left over, so that the rank of ``out`` is up to ``iterations`` r.
      local_error: True if error feedback keeps ``M_i`` minus this worker's own part, as published;
        False if it keeps ``M_i`` minus ``out``. The results and the mean of the memories are the
        same.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: 32 r rows and 32 r columns, in turn. ``bits`` are those of step 0, and
      ``codec.at(step).bits`` those of any step.

    Raises:
      ValueError: for an option out of range; the message names it.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.acp_sgd(1)
      >>> x = np.float32(np.outer([1.0, 2.0, 3.0], [2.0, 0.0, 1.0, 1.0]))
      >>> update = jax.jit(compressor.update)
      >>> out, state = update(x, compressor.init(x))
      >>> out, _ = update(x, state)
      >>> np.allclose(out, x, atol=1e-5)
      True
      >>> [compressor.codec.at(t).bits((3, 4)) for t in (0, 1)]
      [96, 128]

    References:
      Zhang et al., Evaluation and optimization of gradient compression for distributed deep
      learning, ICDCS 2023, by its public code (lzhangbv/powersgd, acpsgd.py);
      several halves in a step: epfml/powersgd, powersgd/powersgd.py.
    """
    return averaged_factors(
        "acp_sgd",
        AcpSgd,
        rank,
        key=key,
        start_step=start_step,
        min_compression=min_compression,
        iterations=iterations,
        local_error=local_error,
        batch_axes=batch_axes,
    )
