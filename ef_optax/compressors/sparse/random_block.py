"""One block of consecutive values, whose random start all workers share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.requests import Message
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._random_positions import SharedPositions


@dataclasses.dataclass(frozen=True)
class RandomBlock(SharedPositions):
    """k values from a random start on, wrapping round; all workers have the same start."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        start = jax.random.randint(key, (1,), 0, max(1, x.size)).astype(jnp.uint32)
        return {"start": start, "values": self.taken(x, self._indices(start, x.size))}

    def _indices(self, start: Array, size: int) -> Array:
        steps = jnp.arange(self.count(size), dtype=jnp.uint32)
        return (start + steps) % jnp.uint32(max(1, size))

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        return self._indices(message["start"], size_of(like.shape)), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.count(size_of(shape)) * bits_of(dtype)


def random_block(
    ratio: float | None = None, key: Any = None, *, k: int | None = None, scaled: bool = False
) -> Compressor:
    """Keeps k consecutive values of every leaf, from a random start that all workers share.

    ``C(x)`` is x (times d/k if ``scaled``) on the block, which wraps round at the end, and 0
    elsewhere. This linear map is the same on all workers, so only the k values travel, and they are
    summed. In theory it is as good as :func:`ef_optax.random_k` (alpha = k/d, or omega = d/k - 1 if
    scaled; exact). It needs less memory traffic, and is worse if neighbouring values are similar.

    Args:
      ratio: kept / total in (0, 1].
      key: a JAX random key or an int; step and leaf are folded in, the worker is not.
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.
      scaled: multiply by d/k to make it unbiased. Use False under error feedback.

    Returns:
      The compressor. Bits: 32 k.

    Raises:
      ValueError: for a bad ``ratio`` or ``k``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.random_block(0.5, key=0)
      >>> x = np.ones(6, "f4")
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> len(np.flatnonzero(out))
      3

    References:
      Vogels, Karimireddy, Jaggi, PowerSGD, 2019, section 4.1 (random block).
    """
    check_ratio_or_k("random_block", ratio, k)
    check.flag("random_block", "scaled", scaled)
    return Compressor(RandomBlock(as_key(key, "random_block"), ratio, k, scaled))
