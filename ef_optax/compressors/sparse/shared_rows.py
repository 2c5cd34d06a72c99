"""The rows or columns of the largest magnitude, the same on all workers, whole.

sum:          mean over workers of the 1-norm of every row
all_reduce:   the k rows for which it is largest, as they are
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.matrix import Matrices, matrix_view
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse.dct_top_k import dct_matrix

Side = Literal["rows", "columns", "shorter"]
Basis = Literal["plain", "dct"]


@dataclasses.dataclass(frozen=True)
class SharedRows(MessagelessCodec):
    """The rows (or columns) of every matrix whose mean 1-norm over the workers is the largest."""

    ratio: float | None = None
    k: int | None = None
    side: Side = "rows"
    parts: int = 1
    transform: Basis = "plain"
    batch_axes: int = 0

    why: ClassVar[str] = (
        "all workers choose its rows together. Use it in error_feedback or compressed_mean."
    )

    @property
    def traits(self) -> Traits:
        return Traits(independent=False)

    def plan(self, shape: Shape) -> tuple[Matrices, bool, int] | None:
        """The matrices, whether columns are chosen, and how many of each part; None if dense."""
        view = matrix_view(shape, self.batch_axes)
        if view is None:
            return None
        shorter = self.side == "shorter" and view.columns <= view.rows
        across = self.side == "columns" or shorter
        count = view.columns if across else view.rows
        if count % self.parts:
            raise ValueError(
                f"shared_rows: parts={self.parts} must divide the {count} "
                f"{'columns' if across else 'rows'} of a leaf of shape {shape}; choose another "
                "number of parts for it with ef_optax.per_leaf."
            )
        k = resolve_k(self.ratio, self.k, count // self.parts)
        return None if k * self.parts == count else (view, across, k)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        del workers
        plan = self.plan(x.shape)
        if plan is None:
            mean = yield Mean(x)
            return Outcome(
                aggregate=mean,
                state=state,
                sent=lambda: x,
                residual=lambda: jnp.zeros_like(x),
                support=lambda: jnp.ones(x.shape, bool),
            )
        view, across, k = plan
        rows = self._rows(x, view, across)
        norms = yield Mean(jnp.sum(jnp.abs(rows), axis=-1))
        chosen = self._largest(norms, k)[..., None]
        own = jnp.take_along_axis(rows, chosen, axis=1)
        mean = yield Mean(own)
        matrices = jnp.arange(view.number)[:, None, None]

        def placed(values: Array) -> Array:
            zeros = jnp.zeros(rows.shape, rows.dtype)  # not like x, which differs by worker
            full = zeros.at[matrices, chosen, jnp.arange(rows.shape[-1])].set(values)
            return self._leaf(full, view, across).astype(x.dtype).reshape(x.shape)

        dense = self.transform != "plain"
        return Outcome(
            aggregate=placed(mean),
            state=state,
            sent=lambda: placed(own),
            residual=lambda: x - placed(own),
            support=lambda: jnp.ones(x.shape, bool) if dense else placed(jnp.ones_like(own)) != 0,
        )

    def _rows(self, x: Array, view: Matrices, across: bool) -> Array:
        """The matrices with what is chosen as their rows, transformed along the columns."""
        rows = x.astype(wide_dtype(x.dtype)).reshape(view.number, view.rows, view.columns)
        rows = jnp.swapaxes(rows, 1, 2) if across else rows
        return rows if self.transform == "plain" else einsum("fa,nab->nfb", self._basis(rows), rows)

    def _leaf(self, rows: Array, view: Matrices, across: bool) -> Array:
        """The inverse of :meth:`_rows`, as (number, rows, columns)."""
        del view
        rows = rows if self.transform == "plain" else einsum("fa,nfb->nab", self._basis(rows), rows)
        return jnp.swapaxes(rows, 1, 2) if across else rows

    @staticmethod
    def _basis(rows: Array) -> Array:
        return jnp.asarray(dct_matrix(rows.shape[1]), rows.dtype)

    def _largest(self, norms: Array, k: int) -> Array:
        """The numbers of the k largest of each part, (matrices, parts k)."""
        number, count = norms.shape
        length = count // self.parts
        _, local = jax.lax.top_k(norms.reshape(number, self.parts, length), k)
        return (local + length * jnp.arange(self.parts, dtype=local.dtype)[:, None]).reshape(
            number, self.parts * k
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """The norms, then the rows; one round for a dense leaf."""
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return (size_of(shape) * bits_of(dtype),)
        view, across, k = plan
        count, width = (view.columns, view.rows) if across else (view.rows, view.columns)
        wide = bits_of(wide_dtype(dtype)) * view.number
        return count * wide, k * self.parts * width * wide

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def shared_rows(
    ratio: float | None = None,
    *,
    k: int | None = None,
    side: Side = "rows",
    parts: int = 1,
    transform: Basis = "plain",
    batch_axes: int = 0,
) -> Compressor:
    r"""The k rows of the largest mean 1-norm, the same on all workers, without indices.

    .. math:: s_r = \text{mean}_i\,\|x_{i,r}\|_1, \quad S = \text{the } k \text{ largest of } s,
              \quad \text{out}_S = \text{mean}_i\,x_{i,S}

    A leaf is the matrix (all but the last axis) x (last axis). Both rounds are plain all-reduces,
    and the aggregate is exactly the mean of what was sent. It is what Dion2 takes of its momentum;
    with ``transform="dct"`` the matrix is first transformed by the orthonormal cosine transform
    (DCT-II) along the chosen side, so that its k largest frequencies are sent, as in Trion and
    DCT-AdamW. Leaves with fewer than two axes are averaged without compression. :func:`arc_top_k`
    chooses by a sketch of the mean instead, which sees where workers cancel.

    Args:
      ratio: rows kept / all rows, in (0, 1].
      k: number of rows kept of each matrix (of each part); give either ``k`` or ``ratio``.
      side: what is kept whole: ``"rows"``, ``"columns"``, or whichever there are fewer of, which
        are columns if there are as many.
      parts: equal parts into which the rows are cut; of each the largest are chosen.
      transform: ``"plain"``, or ``"dct"`` for frequencies in place of rows.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: 32 rows + 32 k columns, in two rounds.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, for an option out of range, or
        if ``parts`` does not divide the rows of a leaf.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.compressed_mean(ef.shared_rows(k=1), axis_name="w"), 2, "w")
      >>> x = jnp.array([[[1.0, 1.0], [4.0, 0.0]], [[2.0, 2.0], [0.0, -4.0]]])  # two workers
      >>> tx.update(x, tx.init(x[0]), x[0])[0].tolist()
      [[0.0, 0.0], [2.0, -2.0]]

    References:
      The selection of Dion2 (arXiv 2512.16928; microsoft/dion, dion/dion2.py) and of Trion
      (IST-DASLab/ISTA-DASLab-Optimizers, fft_low_rank/), on one worker; the mean over workers is
      derived.
    """
    check_ratio_or_k("shared_rows", ratio, k)
    check.word("shared_rows", "side", side, ("rows", "columns", "shorter"))
    check.count("shared_rows", "parts", parts)
    check.word("shared_rows", "transform", transform, ("plain", "dct"))
    check.count("shared_rows", "batch_axes", batch_axes, least=0)
    return Compressor(SharedRows(ratio, k, side, parts, transform, batch_axes))
