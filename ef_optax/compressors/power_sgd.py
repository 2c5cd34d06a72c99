"""PowerSGD: one step of power iteration for each training step, from where the last one stopped."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._base import (
    Array,
    Codec,
    Mean,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    as_key,
    bits_of,
    size_of,
    wide_dtype,
)
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import check_positive
from ef_optax.compressors._matrix import low_rank_shape, orthonormal


@dataclasses.dataclass(frozen=True)
class PowerSgd(Codec):
    """``P Q^T`` with P an orthonormal basis of mean(M_i Q) and Q = mean(M_i^T P)."""

    rank: int
    key: Array
    min_compression: float = 1.0
    iterations: int = 1
    local_error: bool = False

    stateful: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = ("reduce",)

    def plan(self, shape: Shape) -> tuple[int, int, int] | None:
        """Rows, columns and rank, or None for a leaf that is sent dense."""
        plan = low_rank_shape(shape, self.rank)
        if plan is None:
            return None
        rows, columns, rank = plan
        return plan if rows * columns > self.min_compression * rank * (rows + columns) else None

    def init(self, like: Any, path: str) -> Any:
        plan = self.plan(like.shape)
        if plan is None:
            return ()
        _, columns, rank = plan
        key = jax.random.fold_in(self.key, zlib.crc32(path.encode()))
        return jax.random.normal(key, (columns, rank), wide_dtype(like.dtype))

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        plan = self.plan(x.shape)
        if plan is None:
            mean = yield Mean(x)
            return self._outcome(x, mean, x, state)
        matrix = x.astype(wide_dtype(x.dtype)).reshape(plan[:2])
        Q = own = state
        P = jnp.zeros((plan[0], plan[2]), matrix.dtype)
        for _ in range(self.iterations):
            P = yield Mean(matrix @ Q)
            P = orthonormal(P)
            own = matrix.T @ P
            Q = yield Mean(own)

        def value(factor: Array) -> Array:
            return (P @ factor.T).astype(x.dtype).reshape(x.shape)

        out = value(Q)
        # After a step without any gradient the last directions are better than none.
        after = jnp.where(jnp.any(Q != 0), Q, state)
        return self._outcome(x, out, value(own) if self.local_error else out, after)

    @staticmethod
    def _outcome(x: Array, aggregate: Array, sent: Array, state: Any) -> Outcome:
        return Outcome(
            aggregate=aggregate,
            state=state,
            sent=lambda: sent,
            residual=lambda: x - sent,
            support=lambda: jnp.ones(x.shape, bool),
        )

    def encode(self, x: Array, key: Array | None = None) -> Message:
        raise TypeError(self._why("encode"))

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        raise TypeError(self._why("decode"))

    @staticmethod
    def _why(what: str) -> str:
        return (
            f"power_sgd has no {what}: its two factors are averaged one after the other. Use it in "
            "error_feedback or compressed_mean, or take ef_optax.svd for a message of one worker."
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return (size_of(shape) * bits_of(dtype),)
        rows, columns, rank = plan
        wide = bits_of(wide_dtype(dtype)) * rank
        return (rows * wide, columns * wide) * self.iterations

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def power_sgd(
    rank: int,
    *,
    key: Any = 0,
    min_compression: float = 1.0,
    iterations: int = 1,
    local_error: bool = False,
) -> Compressor:
    """PowerSGD: low-rank factors by warm-started power iteration, averaged by two all-reduces.

    For a leaf as matrix M_i (all but the last axis by the last axis), with Q from the step before::

        P = mean M_i Q;  P = orthonormal basis of P;  Q = mean M_i^T P;  out = P Q^T

    Exact after one step once rank(mean M_i) <= r; no contraction constant for a given Q. A leaf of
    fewer than two axes, or one that would not shrink by ``min_compression``, is averaged dense,
    without error. Q is the same on all workers, part of the state, and kept over a step of zero
    gradients; bfloat16 leaves are computed in float32.

    Args:
      rank: r, at most the smaller side of each matrix.
      key: of the first Q, a standard normal matrix; the same on all workers.
      min_compression: compress a leaf only if it has more than this many times the elements
        of its factors (2 in the authors' package).
      iterations: power iterations in each step, two rounds of communication each.
      local_error: error feedback keeps ``M_i - P (M_i^T P)^T`` of each worker instead of
        ``M_i - out``. The results and the mean of the memories are the same; the single memories
        stay small only with True if the workers' gradients differ. Use True with worker weights.

    Returns:
      The compressor. Bits: 32 r rows + 32 r columns, in two rounds, for each iteration.

    Raises:
      ValueError: for a bad ``rank``, ``iterations`` or ``min_compression``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.power_sgd(1)
      >>> x = jnp.outer(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 0.0, 1.0, 1.0]))
      >>> out, _ = compressor.update(x, compressor.init(x))
      >>> bool(jnp.allclose(out, x, atol=1e-5)), compressor.bits((3, 4))
      (True, 224)

    References:
      Vogels, Karimireddy, Jaggi, PowerSGD, 2019, Algorithm 1.
    """
    check_positive("power_sgd", "rank", rank)
    check_positive("power_sgd", "iterations", iterations)
    if not (isinstance(min_compression, float | int) and min_compression >= 1):
        raise ValueError(f"power_sgd: min_compression={min_compression!r} must be at least 1.")
    codec = PowerSgd(
        rank, as_key(key, "power_sgd"), float(min_compression), iterations, bool(local_error)
    )
    return Compressor(codec)
