"""Hard threshold: every entry of at least a given magnitude."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ef_optax._core.traits import Traits
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._threshold import ThresholdCodec


@dataclasses.dataclass(frozen=True)
class Threshold(ThresholdCodec):
    """``|x| >= value``, at most ``capacity`` of the leaf."""

    value: float
    capacity: float

    @property
    def traits(self) -> Traits:
        return Traits(homogeneous=False)

    def count(self, size: int) -> int:
        return resolve_k(self.capacity, None, size)

    def border(self, flat: Array) -> Array:
        return magnitude_order(jnp.asarray(self.value, flat.dtype))


def threshold(value: float, *, capacity: float = 0.1) -> Compressor:
    """Hard threshold: sends what is at least ``value`` in magnitude.

    ``C(x)_i = x_i`` if ``|x_i| >= value``, else 0, as long as at most c = ceil(capacity d) pass; of
    more the c largest are sent. An absolute compressor: without overflow
    ``||C(x) - x||^2 < (number not sent) value^2``; no contraction constant, not homogeneous.

    Args:
      value: the threshold, > 0, in the units of what is compressed.
      capacity: room in the message, as a share of the leaf in (0, 1].

    Returns:
      The compressor. Bits: 32 + c (32 + ceil(log2 d)), of which the first word says how many
      passed: the *information* is passed (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``value`` or ``capacity``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.threshold(1.0, capacity=0.5)
      >>> compressor.update(jnp.array([-1.0, 0.9, -3.0, 2.0]), compressor.init(None))[0].tolist()
      [0.0, 0.0, -3.0, 2.0]

    References:
      Sahu et al., Rethinking gradient sparsification as total error minimization, 2021.
    """
    check.static_positive("threshold", "value", value)
    check.ratio("threshold", "capacity", capacity)
    return Compressor(Threshold(float(value), float(capacity)))
