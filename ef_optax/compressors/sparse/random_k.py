"""Random-k: k entries drawn at random, of which only a seed and the values travel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core.requests import Message
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key, random_subset
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import check_ratio_or_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._random_positions import RandomPositions, SharedPositions


@dataclasses.dataclass(frozen=True)
class RandomK(RandomPositions):
    """A uniformly random k-subset of each leaf; the message carries the seed, not the indices."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        seed = jax.random.bits(key, (1,), jnp.uint32)
        indices = random_subset(seed[0], x.size, self.count(x.size))
        return {"seed": seed, "values": self.taken(x, indices)}

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        return random_subset(message["seed"][0], size, self.count(size)), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return 32 + self.count(size_of(shape)) * bits_of(dtype)


@dataclasses.dataclass(frozen=True)
class SharedRandomK(SharedPositions, RandomK):
    """The same subset on all workers, so that the seed need not travel."""

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return self.count(size_of(shape)) * bits_of(dtype)


def random_k(
    ratio: float | None = None,
    key: Any = None,
    *,
    k: int | None = None,
    scaled: bool = False,
    shared_mask: bool = False,
) -> Compressor:
    """Keeps a uniformly random k-subset of every leaf, drawn without replacement.

    ``C(x) = (d/k) x`` on the subset if ``scaled`` (unbiased, omega = d/k - 1), else ``x`` there
    (alpha = k/d in expectation); 0 elsewhere. A message is a 32-bit seed and k values: receivers
    draw the same subset from the seed. With ``shared_mask`` all workers draw the same subset, so
    the codec is the same linear map on all of them: no seed travels, and the k values are summed.

    Args:
      ratio: kept / total in (0, 1].
      key: a JAX random key or an int; the step, the leaf's path and (unless ``shared_mask``) the
        worker are folded in, so no two leaves, steps or workers share a mask.
      k: number of values kept of each leaf; give either ``k`` or ``ratio``.
      scaled: multiply by d/k to make it unbiased. Use False under error feedback.
      shared_mask: whether all workers draw the same subset.

    Returns:
      The compressor.

    Raises:
      TypeError: if ``key`` is missing. ValueError: for a bad ``ratio`` or ``k``.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.random_k(0.25, key=0)
      >>> x = np.ones(8, "f4")
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> len(np.flatnonzero(out))
      2

    References:
      Stich, Cordonnier, Jaggi, Sparsified SGD with memory, 2018; the scaled form as in
      Richtarik, Sokolov, Fatkhullin, EF21, 2021.
    """
    check_ratio_or_k("random_k", ratio, k)
    check.flag("random_k", "scaled", scaled)
    check.flag("random_k", "shared_mask", shared_mask)
    kind = SharedRandomK if shared_mask else RandomK
    return Compressor(kind(as_key(key, "random_k"), ratio, k, scaled))
