"""Codecs that send the values at random positions, which do not depend on the leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._core.outcome import Protocol
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.sparse._sparse import Followable


@dataclasses.dataclass(frozen=True)
class RandomPositions(Followable):
    """k values at random positions, drawn without looking at the leaf; all are equally likely."""

    key: Array
    ratio: float | None = None
    k: int | None = None
    scaled: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.scaled, linear=True, deterministic=False, basis="exact")

    def count(self, size: int) -> int:
        """Number of values kept of a leaf of ``size``."""
        return resolve_k(self.ratio, self.k, size)

    def taken(self, x: Array, indices: Array) -> Array:
        """The values at these indices, times d/k if scaled."""
        factor = x.size / self.count(x.size) if self.scaled and x.size else 1.0
        return x.reshape(-1)[indices] * jnp.asarray(factor, x.dtype)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return None if self.scaled else self.count(size) / size if size else 1.0

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        del num_workers
        size = size_of(shape)
        return (size / self.count(size) - 1 if size else 0.0) if self.scaled else None

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """If scaled, the variance, which is the same for every input."""
        return self.omega(shape, num_workers) or 0.0


class SharedPositions(RandomPositions):
    """The same positions on all workers, so that only the values travel, and are summed."""

    @property
    def shared_positions(self) -> bool:
        return True

    def step_key(self, workers: Workers) -> Array:
        return workers.fold(self.key, shared=True)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        message = self.encode(x, self.step_key(workers))
        return (yield from self.averaged(x, message, state))
