"""What a protocol knows about the workers without any communication."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import GOLDEN, mix32


@dataclasses.dataclass(frozen=True)
class Workers:
    """What a protocol knows about the workers without any communication.

    Attributes:
      size: number of workers n, a Python int (1 without an axis).
      index: this worker's index in 0..n-1 (an array; 0 without an axis).
      step: number of exchanges made so far (int32 array).
      path: a 32-bit hash of the leaf's path; one hash for each of several leaves.
      slice_index: index of the slice of a model-parallel leaf that this device owns, else 0.
    """

    size: int
    index: Array | int
    step: Array
    path: Any = 0
    slice_index: Array | int = 0

    def fold(self, key: Array, *, shared: bool = False) -> Array:
        """Derives this step's key from the codec's own key.

        The step, the leaf's path and its slice are folded in, and the worker's index unless
        ``shared``, in which case every worker draws the same numbers.
        """
        own_slice = mix32(jnp.asarray(self.slice_index, jnp.uint32))
        stream = jnp.asarray(self.path, jnp.uint32) ^ own_slice
        if not shared:  # one word for all three, because every fold_in takes long to compile
            stream = stream ^ mix32(jnp.asarray(self.index, jnp.uint32) + jnp.uint32(GOLDEN))
        return jax.random.fold_in(jax.random.fold_in(key, self.step), stream)
