"""Low-rank messages of single workers: the best approximation, and ATOMO's unbiased one."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax import _check
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
from ef_optax._linear import matmul
from ef_optax.compressors._blocks import safe_divisor, uniform_noise
from ef_optax.compressors._matrix import (
    Matrices,
    low_rank_product,
    matrix_view,
)


@dataclasses.dataclass(frozen=True)
class FactorCodec(Codec):
    """Messages (left, right) of c columns and rows; a leaf they would not shrink is sent dense."""

    rank: int
    batch_axes: int

    @abc.abstractmethod
    def room(self) -> int:
        """Number of rank-one terms that a message has room for, in a large matrix."""

    @abc.abstractmethod
    def factors(self, matrices: Array, terms: int, key: Array | None) -> tuple[Array, Array]:
        """Left (count, rows, terms) and right (count, terms, columns) factors of the matrices."""

    def plan(self, shape: Shape) -> tuple[Matrices, int] | None:
        """The leaf's matrices and the number of terms of each, or None for a dense message."""
        matrices = matrix_view(shape, self.batch_axes)
        if matrices is None:
            return None
        terms = min(self.room(), matrices.rows, matrices.columns)
        saves = terms * (matrices.rows + matrices.columns) < matrices.rows * matrices.columns
        return (matrices, terms) if saves else None

    def encode(self, x: Array, key: Array | None = None) -> Message:
        plan = self.plan(x.shape)
        if plan is None:
            return x.reshape(-1)
        (_, rows, columns), terms = plan
        wide = x.astype(wide_dtype(x.dtype)).reshape(-1, rows, columns)
        left, right = self.factors(wide, terms, key)
        return {"left": left.reshape(-1), "right": right.reshape(-1)}

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        plan = self.plan(like.shape)
        if plan is None:
            return message.astype(like.dtype).reshape(like.shape)
        (_, rows, columns), terms = plan
        left = message["left"].reshape(-1, rows, terms)
        value = low_rank_product(left, message["right"].reshape(-1, terms, columns))
        return value.astype(like.dtype).reshape(like.shape)

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
        matrices, terms = plan
        left = messages["left"].reshape(-1, matrices.number, matrices.rows, terms)
        right = messages["right"].reshape(-1, matrices.number, terms, matrices.columns)
        n = left.shape[0]
        if weights is not None:
            left = left * weights[:, None, None, None].astype(left.dtype)
        wide = jnp.moveaxis(left, 0, 2).reshape(matrices.number, matrices.rows, n * terms)
        tall = jnp.moveaxis(right, 0, 1).reshape(matrices.number, n * terms, matrices.columns)
        mean = matmul(wide, tall) / jnp.asarray(n if total is None else total, left.dtype)
        return mean.astype(like.dtype).reshape(like.shape)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        plan = self.plan(shape)
        if plan is None:
            return size_of(shape) * bits_of(dtype)
        matrices, terms = plan
        elements = matrices.number * terms * (matrices.rows + matrices.columns)
        return elements * bits_of(wide_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Svd(FactorCodec):
    """The best approximation of rank r."""

    basis: ClassVar[str] = "exact"

    def room(self) -> int:
        return self.rank

    def factors(self, matrices: Array, terms: int, key: Array | None) -> tuple[Array, Array]:
        del key
        left, singular, right = jnp.linalg.svd(matrices, full_matrices=False)
        return left[..., :terms] * singular[..., None, :terms], right[..., :terms, :]

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """R / min(rows, columns), attained by equal singular values."""
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return 1.0
        matrices, terms = plan
        return terms / min(matrices.rows, matrices.columns)


@dataclasses.dataclass(frozen=True)
class Atomo(FactorCodec):
    """Singular value s_j as s_j/p_j with probability p_j = min(1, r s_j / sum s)."""

    key: Array

    basis: ClassVar[str] = "bound"
    unbiased: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def room(self) -> int:
        """Room for four standard deviations more than the expected r terms."""
        return self.rank + math.ceil(4 * math.sqrt(self.rank))

    def factors(self, matrices: Array, terms: int, key: Array | None) -> tuple[Array, Array]:
        assert key is not None
        left, singular, right = jnp.linalg.svd(matrices, full_matrices=False)
        share = singular / safe_divisor(jnp.sum(singular, axis=-1, keepdims=True))
        p = jnp.minimum(1, self.rank * share)
        chosen = uniform_noise(key, p.shape).astype(p.dtype) < p
        # Singular values fall, so if there are too many the smallest stay behind.
        order = jnp.argsort(~chosen, axis=-1, stable=True)[..., :terms]
        scale = jnp.where(chosen, singular / safe_divisor(p), 0)
        scale = jnp.take_along_axis(scale, order, -1)[..., None, :]
        left = jnp.take_along_axis(left, order[..., None, :], -1) * scale
        return left, jnp.take_along_axis(right, order[..., None], -2)

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        """``min(rows, columns)/r``: sum s_j (S/r - s_j) <= S^2/r, S the sum of the s_j (bound)."""
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return 0.0
        matrices, _ = plan
        return min(matrices.rows, matrices.columns) / self.rank


def svd(rank: int, *, batch_axes: int = 0) -> Compressor:
    """The best approximation of rank r of every matrix, by singular value decomposition.

    A leaf is the matrix (all but the last axis) x (last axis). alpha = r / min(rows, columns)
    (exact, for equal singular values). Leaves of fewer than two axes, and those whose factors
    would not be smaller, are sent dense. Costs a full decomposition; see
    :func:`ef_optax.power_sgd`.

    Args:
      rank: r.
      batch_axes: number of leading axes that are no part of the matrix: 1 for layers that are
        stacked for a scan.

    Returns:
      The compressor. Bits: 32 r (rows + columns).

    Raises:
      ValueError: for a bad ``rank`` or ``batch_axes``.

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
    _check.count("svd", "rank", rank)
    _check.count("svd", "batch_axes", batch_axes, least=0)
    return Compressor(Svd(rank, batch_axes))


def atomo(rank: int, key: Any = None, *, batch_axes: int = 0) -> Compressor:
    """ATOMO: each singular value survives with a probability in proportion to it, without bias.

    ``C(M) = sum over the chosen j of (s_j/p_j) u_j v_j^T``, j chosen independently with probability
    p_j = min(1, r s_j / sum s): at most r terms are expected, and there is room for r + 4 sqrt(r)
    (if more are chosen, the smallest stay behind). Unbiased; the variance
    ``sum s_j^2 (1/p_j - 1)`` depends on the data, omega = min(rows, columns)/r (bound; less one for
    equal singular values). Leaves that are no matrix, and those the factors
    would not shrink, are sent dense.

    Args:
      rank: r, the expected number of terms.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      batch_axes: number of leading axes that are no part of the matrix, as for :func:`svd`.

    Returns:
      The compressor. Bits: 32 c (rows + columns), c = min(rows, columns, r + ceil(4 sqrt r)).

    Raises:
      ValueError: for a bad ``rank`` or ``batch_axes``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.atomo(1, key=0).bits((100, 50))
      24000

    References:
      Wang, Sievert, Charles, Liu, Wright, Papailiopoulos, ATOMO, 2018, section 4 and the authors'
      public implementation (which draws again when nothing was chosen; here nothing is sent then).
    """
    _check.count("atomo", "rank", rank)
    _check.count("atomo", "batch_axes", batch_axes, least=0)
    return Compressor(Atomo(rank, batch_axes, as_key(key, "atomo")))
