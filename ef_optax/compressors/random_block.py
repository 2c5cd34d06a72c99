"""One block of consecutive values, at a random place that all workers share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._base import (
    Array,
    Mean,
    Message,
    Outcome,
    Protocol,
    Shape,
    Workers,
    as_key,
    bits_of,
    like_of,
    size_of,
)
from ef_optax._compressor import Compressor
from ef_optax.compressors.sparsify import SparseCodec, check_ratio_or_k, resolve_k


@dataclasses.dataclass(frozen=True)
class RandomBlock(SparseCodec):
    """k values from a random start, wrapping round; the same start on all workers."""

    key: Array
    ratio: float | None = None
    k: int | None = None
    scaled: bool = False

    deterministic: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    shared_positions: ClassVar[bool] = True
    transports: ClassVar[tuple[str, ...]] = ("reduce",)
    basis: ClassVar[str] = "exact"

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.scaled

    def count(self, size: int) -> int:
        return resolve_k(self.ratio, self.k, size)

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        start = jax.random.randint(key, (1,), 0, max(1, flat.size)).astype(jnp.uint32)
        factor = flat.size / self.count(flat.size) if self.scaled and flat.size else 1.0
        values = flat[self._indices(start, flat.size)] * jnp.asarray(factor, x.dtype)
        return {"start": start, "values": values}

    def _indices(self, start: Array, size: int) -> Array:
        steps = jnp.arange(self.count(size), dtype=jnp.uint32)
        return (start + steps) % jnp.uint32(max(1, size))

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        return self._indices(message["start"], size_of(like.shape)), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.count(size_of(shape)) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return None if self.scaled else self.count(size) / size if size else 1.0

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return (size / self.count(size) - 1 if size else 0.0) if self.scaled else None

    def step_key(self, workers: Workers) -> Array:
        return workers.fold(self.key, shared=True)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        like, message = like_of(x), self.encode(x, self.step_key(workers))
        mean = yield Mean(message["values"])
        return Outcome(
            aggregate=self.decode({**message, "values": mean}, like),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda: self.residual(x, message),
            support=lambda: self.support(x, message),
        )


def random_block(
    ratio: float | None = None, key: Any = None, *, k: int | None = None, scaled: bool = False
) -> Compressor:
    """Keeps k consecutive values of every leaf, from a random start that all workers share.

    ``C(x)`` is x (times d/k if ``scaled``) on the block, which wraps round at the end, and 0
    elsewhere: a linear map, the same on all workers, so the messages are summed and nothing but k
    values travels. As good as :func:`ef_optax.random_k` in theory (alpha = k/d, or omega = d/k - 1
    if scaled; exact), cheaper in memory traffic, worse where neighbouring values are alike.

    Args:
      ratio: kept / total in (0, 1].
      key: a JAX random key or an int; step and leaf are folded in, the worker is not.
      k: number of values kept of each leaf; give either this or ``ratio``.
      scaled: multiply by d/k to make it unbiased. Use False under error feedback.

    Returns:
      The compressor. Bits: 32 k.

    Raises:
      ValueError: for a bad ``ratio`` or ``k``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.random_block(0.5, key=0)
      >>> out, _ = compressor.update(jnp.ones(6), compressor.init(jnp.ones(6)))
      >>> int((out != 0).sum())
      3

    References:
      Vogels, Karimireddy, Jaggi, PowerSGD, 2019, section 4.1 (random block).
    """
    check_ratio_or_k("random_block", ratio, k)
    return Compressor(RandomBlock(as_key(key, "random_block"), ratio, k, bool(scaled)))
