"""Mix-k: the largest entries, and some of the others at random."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._bits import fields
from ef_optax._core.requests import Message
from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.random import as_key, random_subset
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import Followable


@dataclasses.dataclass(frozen=True)
class MixK(Followable):
    """The k largest values, and ``random`` of the others drawn at random, all unscaled."""

    key: Array
    k: int
    random: int

    @property
    def traits(self) -> Traits:
        return Traits(deterministic=False, basis="exact")

    def _plan(self, size: int) -> tuple[int, int]:
        """How many are kept by size and how many at random."""
        top = min(self.k, size)
        return top, min(self.random, size - top)

    def count(self, size: int) -> int:
        return sum(self._plan(size))

    def encode(self, x: Array, key: Array | None = None) -> Message:
        assert key is not None
        flat = x.reshape(-1)
        top = top_k_indices(flat, self._plan(flat.size)[0]).astype(jnp.uint32)
        seed = jax.random.bits(key, (1,), jnp.uint32)
        indices = self._indices(top, seed, flat.size)
        packed = fields.pack(top, bits_for(flat.size))
        return {"top": packed, "seed": seed, "values": flat[indices]}

    def _indices(self, top: Array, seed: Array, size: int) -> Array:
        """The indices of the largest, then those of the others that the seed draws."""
        kept, extra = self._plan(size)
        rank = random_subset(seed[0], size - kept, extra)
        # The r-th index that is not in top is r plus the number of top's indices before it.
        gaps = top - jnp.arange(kept, dtype=jnp.uint32)
        passed = jnp.searchsorted(gaps, rank, side="right").astype(jnp.uint32)
        return jnp.concatenate([top, rank + passed])

    def parts(self, message: Message, like: jax.ShapeDtypeStruct) -> tuple[Array, Array]:
        size = size_of(like.shape)
        top = fields.unpack(message["top"], bits_for(size), self._plan(size)[0])
        return self._indices(top, message["seed"], size), message["values"]

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        size = size_of(shape)
        kept = self._plan(size)[0]
        return 32 + kept * bits_for(size) + self.count(size) * bits_of(dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float:
        """(k + random)/d, in expectation."""
        del num_workers
        size = size_of(shape)
        return self.count(size) / size if size else 1.0


def mix_k(k: int, random: int, key: Any = None) -> Compressor:
    """mix-(k, k'): the k largest magnitudes, and k' of the others at random.

    The values are not scaled. alpha = (k + k')/d (exact for equal magnitudes). The message carries
    a 32-bit seed in place of the random indices.

    Args:
      k: values kept by size.
      random: values kept at random.
      key: a JAX random key or an int; step, leaf and worker are folded in.

    Returns:
      The compressor. Bits: 32 + k (32 + ceil(log2 d)) + 32 k'.

    Raises:
      ValueError: for a bad ``k`` or ``random``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor, x = ef.mix_k(1, 2, key=0), np.float32([1.0, 5.0, 1.0, 1.0])
      >>> out, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> float(out[1]), len(np.flatnonzero(out))
      (5.0, 3)

    References:
      Condat, Yi, Richtarik, EF-BV, 2022, section 2.3.
    """
    check.count("mix_k", "k", k)
    check.count("mix_k", "random", random)
    return Compressor(MixK(as_key(key, "mix_k"), k, random))
