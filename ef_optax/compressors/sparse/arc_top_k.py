"""ARC-Top-K: all workers send the same rows, which a random sketch of the mean chooses.

sum:          P = mean_i p_i V,  V normal, the same on all workers: r numbers for each row
all_reduce:   the k rows of P of the largest norm, as they are in p_i
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.matrix import Matrices, matrix_view
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._batches import Batch, batches_of, joined
from ef_optax.compressors._ratio import check_ratio_or_k, resolve_k
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class ArcTopK(MessagelessCodec):
    """The rows of every matrix whose sketched mean is the largest."""

    key: Array
    ratio: float | None = None
    k: int | None = None
    rank: int = 4
    batch_axes: int = 0

    why: ClassVar[str] = (
        "all workers choose its rows together. Use it in error_feedback or compressed_mean."
    )
    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=False, independent=False, granularity="group")

    def plan(self, shape: Shape) -> tuple[Matrices, int] | None:
        """The leaf's matrices and how many of their rows are sent, or None for a dense leaf."""
        matrices = matrix_view(shape, self.batch_axes)
        if matrices is None:
            return None
        _, rows, columns = matrices
        k = resolve_k(self.ratio, self.k, rows)
        return (matrices, k) if rows * self.rank + k * columns < rows * columns else None

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        plans = [self.plan(leaf.shape) for leaf in x]
        batches, dense = batches_of(x, plans, workers.step)
        # Without the path, so that a leaf's rows do not depend on which leaves are beside it.
        key = dataclasses.replace(workers, path=0).fold(self.key, shared=True)
        own_sketches = [self._sketch(batch, key) for batch in batches]
        vectors, split = joined(own_sketches)
        vectors, means = yield Mean((vectors, [x[i] for i in dense]))
        sketches, chosen = split(vectors), []
        for batch, sketch in zip(batches, sketches, strict=True):
            plan = plans[batch.members[0]]
            assert plan is not None
            chosen.append(jax.lax.top_k(jnp.sum(sketch * sketch, axis=-1), plan[1])[1])
        own = [batch.rows(rows) for batch, rows in zip(batches, chosen, strict=True)]
        vectors, split = joined(own)
        vectors = yield Mean(vectors)
        values = split(vectors)

        def filled(make: Callable[[int], Sequence[Array]], rest: Sequence[Array]) -> list[Array]:
            """For each batch ``make(number)``, arrays like its parts; ``rest`` for dense leaves."""
            result = dict(zip(dense, rest, strict=True))
            for number, batch in enumerate(batches):
                parts = batch.of_members(make(number))
                result |= zip(batch.members, parts, strict=True)
            return [result[i].astype(a.dtype).reshape(a.shape) for i, a in enumerate(x)]

        def placed(number: int, values: Sequence[Array]) -> list[Array]:
            """These rows, and zeros elsewhere."""
            batch = batches[number]
            zeros = [jnp.zeros_like(part) for part in batch.parts]
            return batch.add_rows(zeros, chosen[number], values[number])

        def left(number: int) -> list[Array]:
            batch = batches[number]
            return batch.add_rows(batch.parts, chosen[number], -own[number])

        return Outcome(
            aggregate=filled(lambda number: placed(number, values), means),
            state=state,
            sent=lambda: filled(lambda number: placed(number, own), [x[i] for i in dense]),
            residual=lambda: filled(left, [jnp.zeros_like(x[i]) for i in dense]),
            support=lambda: [
                mask != 0
                for mask in filled(
                    lambda number: placed(number, [jnp.ones_like(rows) for rows in own]),
                    [jnp.ones_like(x[i]) for i in dense],
                )
            ],
        )

    def _sketch(self, batch: Batch, key: Array) -> Array:
        """``p_i V`` as (count, rows, r); matrices of one width share V."""
        count = sum(len(part) for part in batch.parts)
        V = self.directions(key, batch.parts[0].shape[-1], batch.parts[0].dtype)
        return batch.times(jnp.broadcast_to(V, (count, *V.shape)))

    def directions(self, key: Array, columns: int, dtype: Any) -> Array:
        """``V^T`` as (r, columns), of independent standard normal numbers."""
        return jax.random.normal(jax.random.fold_in(key, columns), (self.rank, columns), dtype)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """The sketch, then the rows; all values of a dense leaf in the first round."""
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return (size_of(shape) * bits_of(dtype),)
        matrices, k = plan
        wide = bits_of(wide_dtype(dtype)) * matrices.number
        return matrices.rows * self.rank * wide, k * matrices.columns * wide

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def arc_top_k(
    ratio: float | None = None,
    *,
    k: int | None = None,
    rank: int = 4,
    key: Any = 0,
    batch_axes: int = 0,
) -> Compressor:
    r"""ARC-Top-K: the k rows of the mean with the largest norm, as a random sketch shows it.

    For a leaf as a matrix :math:`p_i` (all but the last axis by the last axis), and a normal matrix
    V of r columns that all workers draw from the same key,

    .. math:: P = \text{mean}_i\,p_i V, \quad S = \text{the } k \text{ rows of largest } |P_s|^2,
              \quad \text{out}_S = \text{mean}_i\,p_{i,S}

    All workers send the same rows, so both rounds are plain all-reduces: no indices travel, and the
    traffic of a device does not grow with the number of workers, as it does if the messages of
    :func:`ef_optax.top_k` are gathered. The aggregate is exactly the mean of what was sent, and for
    equal workers it loses nothing by the exchange. With a growing r the rows are those of the mean
    itself. No contraction constant is known, but a residual is never longer than its input.

    A leaf with fewer than two axes, or one whose sketch and rows together are not smaller, is
    averaged without compression. Matrices of one shape are handled as one batch, so a model takes
    two collectives and a few kernels per shape, whatever its number of leaves.

    The sketch is ``rank / columns`` of a leaf. If leaves are narrow, use a lower rank for them
    (:func:`ef_optax.per_leaf`).

    Args:
      ratio: rows kept / all rows, in (0, 1]; the authors use 0.2.
      k: number of rows kept of each matrix; give either ``k`` or ``ratio``.
      rank: r, the number of columns of V; the authors use 4.
      key: a JAX random key or an int; step and slice are folded in, the worker is not.
      batch_axes: number of leading axes that are not part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: 32 r rows + 32 k columns, in two rounds.

    Raises:
      ValueError: unless exactly one of ``ratio`` and ``k`` is given, or for an option out of range.
      TypeError: if ``key`` is not a random key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.simulate(ef.compressed_mean(ef.arc_top_k(k=1), axis_name="w"), 2, "w")
      >>> small, large = jnp.ones((3, 8)), jnp.ones((3, 8)).at[1].set(-9.0)
      >>> updates, _ = tx.update(jnp.stack([small, large]), tx.init(small), small)
      >>> updates[:, 0].tolist()
      [0.0, -4.0, 0.0]

    References:
      "ARC-Top-K", 2025 (arXiv 2510.26709), and the authors' code,
      yiran529/ARC-TopK: comm_hooks/group_topk_hook_no_reshape.py, which also averages vectors
      without compression, and then keeps the largest entries of the mean only.
    """
    check_ratio_or_k("arc_top_k", ratio, k)
    check.count("arc_top_k", "rank", rank)
    check.count("arc_top_k", "batch_axes", batch_axes, least=0)
    return Compressor(ArcTopK(as_key(key, "arc_top_k"), ratio, k, rank, batch_axes))
