"""Perm-k: a random permutation divides the coordinates among the workers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key, random_subset
from ef_optax._numeric.shapes import Shape, like_of, size_of
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import scatter


@dataclasses.dataclass(frozen=True)
class PermK(Codec):
    """Worker i sends n times the values in its share of a permutation that all workers draw."""

    key: Array

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, linear=True, deterministic=False, basis="exact")

    def encode(self, x: Array, key: Array | None = None) -> Message:
        """The message of a single worker, whose share is the whole leaf."""
        del key
        return x.reshape(-1)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        return message.astype(like.dtype).reshape(like.shape)

    def share(self, size: int, num_workers: int) -> int:
        """Number of slots of each worker, ceil(d / n)."""
        return math.ceil(size / num_workers)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        like, n = like_of(x), workers.size
        share = self.share(x.size, n)
        seed = jax.random.bits(workers.fold(self.key, shared=True), (), jnp.uint32)
        # Slots from the size on are empty, so every coordinate is in each share with probability
        # 1/n, whether or not n divides the size.
        slots = random_subset(seed, n * share, n * share).reshape(n, share)
        own = slots[workers.index]
        flat = x.reshape(-1)
        values = jnp.take(flat, own.astype(jnp.int32), mode="fill", fill_value=0)
        gathered: Gathered = yield Gather(values)
        parts = gathered.messages.astype(x.dtype) * jnp.asarray(n, x.dtype)
        if gathered.weights is not None:
            parts = parts * gathered.weights[:, None].astype(x.dtype)
        parts = parts / jnp.asarray(gathered.total, x.dtype)

        def support() -> Array:
            mask = jnp.zeros(x.size, bool).at[own].set(True, mode="drop")
            return mask.reshape(x.shape)

        sent = scatter(values * jnp.asarray(n, x.dtype), own, like)
        return Outcome(
            aggregate=scatter(parts.reshape(-1), slots.reshape(-1), like),
            state=state,
            sent=lambda: sent,
            residual=lambda: x - sent,
            support=support,
        )

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Bits of a single worker, which sends the leaf; see :meth:`traffic` for n workers."""
        return size_of(shape) * bits_of(dtype)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        return (self.share(size_of(shape), num_workers) * bits_of(dtype),)

    def omega(self, shape: Shape, num_workers: int = 1) -> float:
        """The variance of each worker, n - 1; the mean over equal inputs has no error."""
        del shape
        return float(num_workers - 1)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """The variance, which is the same for every input."""
        return self.omega(shape, num_workers)


def perm_k(key: Any = None) -> Compressor:
    """Perm-k: each coordinate is sent by exactly one worker, chosen at random.

    All workers draw the same permutation of n ceil(d/n) slots; worker i sends the values in its
    ceil(d/n) slots, times n. Each worker's message is unbiased with omega = n - 1 (exact), but the
    workers' errors cancel: the mean over workers with equal inputs is exact, and in general
    ``E||mean C_i(x_i) - mean x_i||^2 = mean ||x_i||^2 - ||mean x_i||^2`` if n divides d.
    No index travels. It is meant for unbiased rules such as MARINA, not for error feedback.

    Args:
      key: a JAX random key or an int; step and leaf are folded in, the worker is not.

    Returns:
      The compressor. Bits: 32 ceil(d/n) per worker.

    Raises:
      TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.compressed_mean(ef.exchanges.perm_k(key=0), axis_name="data")
      >>> tx = ef.simulate(tx, num_workers=2, axis_name="data")
      >>> params = jnp.zeros(3)
      >>> equal = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
      >>> tx.update(equal, tx.init(params), params)[0].tolist()
      [1.0, 2.0, 3.0]

    References:
      Szlendak, Tyurin, Richtarik, Permutation compressors for provably faster distributed nonconvex
      optimization, 2022, Definition 2 and Assumption 4 (AB inequality with A = B = 1).
    """
    return Compressor(PermK(as_key(key, "perm_k")))
