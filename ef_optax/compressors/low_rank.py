"""Low-rank messages of single workers: the best approximation, and ATOMO's unbiased one."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._base import (
    Array,
    Codec,
    Message,
    Shape,
    as_key,
    bits_of,
    size_of,
    wide_dtype,
)
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import check_positive, safe_divisor, uniform_noise
from ef_optax.compressors._matrix import low_rank_shape


class FactorCodec(Codec):
    """Messages (left, right) of c columns and rows; a leaf they would not shrink is sent dense."""

    @abc.abstractmethod
    def columns(self, shape: Shape) -> int:
        """Number of rank-one terms in a message."""

    @abc.abstractmethod
    def factors(self, matrix: Array, count: int, key: Array | None) -> tuple[Array, Array]:
        """Left (rows, count) and right (count, columns) factors of a matrix."""

    def plan(self, shape: Shape) -> tuple[int, int, int] | None:
        """Rows, columns and number of terms, or None for a dense message."""
        return low_rank_shape(shape, self.columns(shape))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        plan = self.plan(x.shape)
        if plan is None:
            return x.reshape(-1)
        matrix = x.astype(wide_dtype(x.dtype)).reshape(plan[:2])
        left, right = self.factors(matrix, plan[2], key)
        return {"left": left.reshape(-1), "right": right.reshape(-1)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        plan = self.plan(like.shape)
        if plan is None:
            return message.astype(like.dtype).reshape(like.shape)
        rows, columns, count = plan
        left = message["left"].reshape(rows, count)
        return (
            (left @ message["right"].reshape(count, columns)).astype(like.dtype).reshape(like.shape)
        )

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """One product of all workers' factors side by side."""
        plan = self.plan(like.shape)
        if plan is None:
            return super().decode_mean(messages, like, weights, total)
        rows, columns, count = plan
        left = messages["left"].reshape(-1, rows, count)
        n = left.shape[0]
        if weights is not None:
            left = left * weights[:, None, None].astype(left.dtype)
        wide = jnp.moveaxis(left, 0, 1).reshape(rows, n * count)
        mean = wide @ messages["right"].reshape(n * count, columns)
        mean = mean / jnp.asarray(n if total is None else total, mean.dtype)
        return mean.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        plan = self.plan(shape)
        if plan is None:
            return size_of(shape) * bits_of(dtype)
        rows, columns, count = plan
        return count * (rows + columns) * bits_of(wide_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Svd(FactorCodec):
    """The best approximation of rank r."""

    rank: int
    basis: ClassVar[str] = "exact"

    def columns(self, shape: Shape) -> int:
        del shape
        return self.rank

    def factors(self, matrix: Array, count: int, key: Array | None) -> tuple[Array, Array]:
        del key
        left, singular, right = jnp.linalg.svd(matrix, full_matrices=False)
        return left[:, :count] * singular[:count], right[:count]

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """R / min(rows, columns), attained by equal singular values."""
        del num_workers
        plan = self.plan(shape)
        return 1.0 if plan is None else plan[2] / min(plan[:2])


@dataclasses.dataclass(frozen=True)
class Atomo(FactorCodec):
    """Singular value s_j as s_j/p_j with probability p_j = min(1, r s_j / sum s)."""

    rank: int
    key: Array

    unbiased: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def columns(self, shape: Shape) -> int:
        """Room for four standard deviations more than the expected r terms."""
        del shape
        return self.rank + math.ceil(4 * math.sqrt(self.rank))

    def factors(self, matrix: Array, count: int, key: Array | None) -> tuple[Array, Array]:
        assert key is not None
        left, singular, right = jnp.linalg.svd(matrix, full_matrices=False)
        p = jnp.minimum(1, self.rank * (singular / safe_divisor(jnp.sum(singular))))
        chosen = uniform_noise(key, p.shape).astype(p.dtype) < p
        # Singular values fall, so if there are too many the smallest stay behind.
        order = jnp.argsort(~chosen, stable=True)[:count]
        scale = jnp.where(chosen, singular / safe_divisor(p), 0)[order]
        return left[:, order] * scale, right[order]


def svd(rank: int) -> Compressor:
    """The best approximation of rank r of every matrix, by singular value decomposition.

    A leaf is the matrix (all but the last axis) x (last axis). alpha = r / min(rows, columns)
    (exact, for equal singular values). Leaves of fewer than two axes, and those whose factors
    would not be smaller, are sent dense. Costs a full decomposition; see
    :func:`ef_optax.power_sgd`.

    Args:
      rank: r.

    Returns:
      The compressor. Bits: 32 r (rows + columns).

    Raises:
      ValueError: for a bad ``rank``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.svd(1)
      >>> x = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
      >>> out, _ = compressor.update(x, compressor.init(x))
      >>> bool(jnp.allclose(out, jnp.diag(jnp.array([3.0, 0.0, 0.0])), atol=1e-6))
      True

    References:
      Eckart, Young, 1936; as a gradient compressor the Rank-K of Safaryan, Islamov, Qian,
      Richtarik, FedNL, 2022.
    """
    check_positive("svd", "rank", rank)
    return Compressor(Svd(rank))


def atomo(rank: int, key: Any = None) -> Compressor:
    """ATOMO: each singular value survives with a probability in proportion to it, without bias.

    ``C(M) = sum over the chosen j of (s_j/p_j) u_j v_j^T``, j chosen independently with probability
    p_j = min(1, r s_j / sum s): at most r terms are expected, and there is room for r + 4 sqrt(r)
    (if more are chosen, the smallest stay behind). Unbiased; the variance
    ``sum s_j^2 (1/p_j - 1)`` depends on the data. Leaves that are no matrix, and those the factors
    would not shrink, are sent dense.

    Args:
      rank: r, the expected number of terms.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: 32 c (rows + columns), c = min(rows, columns, r + ceil(4 sqrt r)).

    Raises:
      ValueError: for a bad ``rank``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.atomo(1, key=0).bits((100, 50))
      24000

    References:
      Wang, Sievert, Charles, Liu, Wright, Papailiopoulos, ATOMO, 2018, section 4 and the authors'
      public implementation (which draws again when nothing was chosen; here nothing is sent then).
    """
    check_positive("atomo", "rank", rank)
    return Compressor(Atomo(rank, as_key(key, "atomo")))
