"""ATOMO: an unbiased random choice of singular vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import as_key, uniform_noise
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.low_rank._factors import FactorCodec


@dataclasses.dataclass(frozen=True)
class Atomo(FactorCodec):
    """Sends a singular value s_j as s_j/p_j with probability p_j = min(1, r s_j / sum s)."""

    key: Array

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, deterministic=False, basis="bound")

    def room(self) -> int:
        """The expected r terms, plus four standard deviations."""
        return self.rank + math.ceil(4 * math.sqrt(self.rank))

    def factors(self, matrices: Array, terms: int, key: Array | None) -> tuple[Array, Array]:
        assert key is not None
        left, singular, right = jnp.linalg.svd(matrices, full_matrices=False)
        share = singular / safe_divisor(jnp.sum(singular, axis=-1, keepdims=True))
        p = jnp.minimum(1, self.rank * share)
        chosen = uniform_noise(key, p.shape).astype(p.dtype) < p
        # Singular values are in descending order, so if too many are chosen, the smallest are cut.
        order = jnp.argsort(~chosen, axis=-1, stable=True)[..., :terms]
        scale = jnp.where(chosen, singular / safe_divisor(p), 0)
        scale = jnp.take_along_axis(scale, order, -1)[..., None, :]
        left = jnp.take_along_axis(left, order[..., None, :], -1) * scale
        return left, jnp.take_along_axis(right, order[..., None], -2)

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        """``min(rows, columns)/r``, as sum s_j (S/r - s_j) <= S^2/r for S = sum s_j (bound)."""
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return 0.0
        matrices, _ = plan
        return min(matrices.rows, matrices.columns) / self.rank

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """``1/p - 1`` for equal singular values, each kept with ``p = r / min(rows, columns)``."""
        return max(0.0, self.omega(shape, num_workers) - 1)


def atomo(rank: int, key: Any = None, *, batch_axes: int = 0) -> Compressor:
    """ATOMO: keeps each singular value with a probability proportional to it, without bias.

    ``C(M) = sum over the chosen j of (s_j/p_j) u_j v_j^T``, where each j is chosen independently
    with probability p_j = min(1, r s_j / sum s). The expected number of terms is at most r, and the
    message holds r + 4 sqrt(r); if more are chosen, the smallest are left out. It is unbiased. The
    variance ``sum s_j^2 (1/p_j - 1)`` depends on the data, and omega = min(rows, columns)/r (bound;
    one less for equal singular values). Leaves that are not matrices are sent dense, and so are
    those whose factors would not be smaller.

    Args:
      rank: r, the expected number of terms.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      batch_axes: number of leading axes that are not part of the matrix, as for :func:`svd`.

    Returns:
      The compressor. Bits: 32 c (rows + columns), with c = min(rows, columns, r + ceil(4 sqrt r)).

    Raises:
      ValueError: for a bad ``rank`` or ``batch_axes``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.atomo(1, key=0).bits((100, 50))
      24000

    References:
      Wang, Sievert, Charles, Liu, Wright, Papailiopoulos, ATOMO, 2018, section 4 and the authors'
      public implementation (which draws again if nothing is chosen; here nothing is sent then).
    """
    check.count("atomo", "rank", rank)
    check.count("atomo", "batch_axes", batch_axes, least=0)
    return Compressor(Atomo(rank, batch_axes, as_key(key, "atomo")))
