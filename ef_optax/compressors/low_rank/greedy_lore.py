"""GreedyLore: directions from a dense step now and then, of which the best few are sent.

dense step     H = mean H_i ;  U = its left singular vectors
choice         l_j = mean <(U^T H_i)_j, v_j>, v_j normal and shared ;  J = the r largest l_j^2
all others     R_i = U_J^T H_i ;  out = U_J mean R_i
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.policy import Stage, Stages, StepPolicy
from ef_optax._core.requests import Mean
from ef_optax._core.timeline import Timeline
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.matrix import Matrices, from_thin_rows, matrix_view, thin_rows
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class GreedyLore(MessagelessCodec, StepPolicy):
    """``U_J U_J^T`` of the mean, with U from the last dense step; ``dense`` is such a step."""

    key: Array
    rank: int
    period: int
    batch_axes: int = 0
    dense: bool = False

    why: ClassVar[str] = (
        "all workers choose its directions together. Use it in error_feedback or compressed_mean."
    )

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=False, independent=False, stateful=True)

    @property
    def stages(self) -> Stages:
        dense, sparse = (Stage(dataclasses.replace(self, dense=dense)) for dense in (True, False))
        if self.period == 1:
            return Stages(Timeline(), (dense,))
        return Stages(Timeline((1, self.period), 0, self.period), (dense, sparse))

    def plan(self, shape: Shape) -> Matrices | None:
        """The leaf's matrices with the shorter side as rows, or None for a dense leaf."""
        view = matrix_view(shape, self.batch_axes)
        if view is None:
            return None
        a, b = sorted((view.rows, view.columns))
        return Matrices(view.lead, a, b) if a + self.rank * b < a * b else None

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        """U as (matrices, a, a); () for a dense leaf."""
        del path, num_workers
        plan = self.plan(like.shape)
        if plan is None:
            return ()
        return jnp.zeros((plan.number, plan.rows, plan.rows), wide_dtype(like.dtype))

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        plan = self.plan(x.shape)
        if plan is None or self.dense:
            mean = yield Mean(x)
            after = state
            if plan is not None and self.period > 1:
                after = jnp.linalg.svd(thin_rows(mean, self.batch_axes), full_matrices=False)[0]
            return _outcome(x, mean, x, after)
        H, U, like = thin_rows(x, self.batch_axes), state, like_of(x)
        v = jax.random.normal(workers.fold(self.key, shared=True), H.shape, H.dtype)
        lam = yield Mean(jnp.sum(einsum("nar,nab->nrb", U, H) * v, axis=-1))
        _, chosen = jax.lax.top_k(lam**2, self.rank)
        U_J = jnp.take_along_axis(U, chosen[:, None, :], axis=2)
        R_i = einsum("nar,nab->nrb", U_J, H)
        R = yield Mean(R_i)

        def value(R: Array) -> Array:
            return from_thin_rows(einsum("nar,nrb->nab", U_J, R), like, self.batch_axes)

        return _outcome(x, value(R), value(R_i), state)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """A number for each direction, then the chosen ones; all values in a dense step."""
        del num_workers
        plan = self.plan(shape)
        if plan is None or self.dense:
            return (size_of(shape) * bits_of(dtype),)
        wide = bits_of(wide_dtype(dtype)) * plan.number
        return plan.rows * wide, self.rank * plan.columns * wide

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def _outcome(x: Array, aggregate: Array, sent: Array, state: Any) -> Outcome:
    return Outcome(
        aggregate=aggregate,
        state=state,
        sent=lambda: sent,
        residual=lambda: x - sent,
        support=lambda: jnp.ones(x.shape, bool),
    )


def greedy_lore(rank: int, *, period: int = 200, key: Any = 0, batch_axes: int = 0) -> Compressor:
    r"""GreedyLore: the r directions that matter most now, of a basis from the last dense step.

    For a leaf as a matrix H_i of a rows and b columns, a <= b (transposed otherwise), every
    ``period``-th exchange is dense, and U are the left singular vectors of its mean. In all others

    .. math:: \lambda_j = \text{mean}_i\,\langle (U^T H_i)_j, v_j \rangle, \quad
              J = \text{the } r \text{ largest } \lambda_j^2, \quad R_i = U_J^T H_i, \quad
              \text{out} = U_J\,\text{mean}_i\,R_i

    with normal vectors v_j that all workers draw alike. Both rounds are plain all-reduces. With
    error feedback (:func:`error_feedback`) it is the method of the paper: a dense step leaves no
    residual. With ``period=1`` every step is dense. No constant is known, but a residual is never
    longer than its input.

    A leaf with fewer than two axes, or one whose a + r b numbers are not fewer, is always dense.

    Args:
      rank: r, the number of directions that are sent.
      period: T, exchanges from one dense one to the next.
      key: a JAX random key or an int; step, leaf and slice are folded in, the worker is not.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits of a sparse exchange: 32 (a + r b), in two rounds;
      ``codec.at(step).bits`` are those of any step. The state is a x a numbers for each matrix.

    Raises:
      ValueError: for an option out of range. TypeError: if ``key`` is not a random key.

    Example:
      >>> import ef_optax as ef
      >>> codec = ef.greedy_lore(2, period=100).codec
      >>> [codec.at(step).bits((64, 64)) for step in (0, 1, 99, 100)]
      [131072, 6144, 6144, 131072]

    References:
      "GreedyLore", 2025 (arXiv 2507.08784), whose printed Algorithm 4 transposes a product wrongly.
    """
    check.count("greedy_lore", "rank", rank)
    check.count("greedy_lore", "period", period)
    check.count("greedy_lore", "batch_axes", batch_axes, least=0)
    return Compressor(GreedyLore(as_key(key, "greedy_lore"), rank, period, batch_axes))
