"""Codecs that round to evenly spaced levels, at random if they have a key."""

from __future__ import annotations

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.traits import Traits
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.random import round_randomly


class Rounding(Codec):
    """Codes of ``width`` bits, rounded at random if there is a key, else to nearest."""

    key: Array | None
    width: int
    block: int | None

    @property
    def separable_into(self) -> int | None:
        return self.block

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.key is not None, deterministic=self.key is None, streams=True)

    @staticmethod
    def round(y: Array, key: Array | None) -> Array:
        """Integers next to y, at random with a key, else to nearest with ties to even."""
        return jnp.round(y) if key is None else round_randomly(y, key)
