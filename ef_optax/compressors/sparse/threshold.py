"""Hard threshold: sends every entry of at least a given magnitude."""

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
    """The entries with ``|x| >= value``, at most the share ``capacity`` of the leaf."""

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
    """Hard threshold: sends every value whose magnitude is at least ``value``.

    ``C(x)_i = x_i`` if ``|x_i| >= value``, else 0. If more than c = ceil(capacity d) values pass,
    the c largest are sent. It is an absolute compressor: unless more than c pass,
    ``||C(x) - x||^2 < (number not sent) value^2``. It has no contraction constant and is not
    homogeneous.

    Args:
      value: the threshold, > 0, in the units of what is compressed.
      capacity: the most values that a message holds, as a share of the leaf in (0, 1].

    Returns:
      The compressor. Bits: 32 + c (32 + ceil(log2 d)). The first word is the number of values that
      passed, so the *information* is passed (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``value`` or ``capacity``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor, x = ef.threshold(1.0, capacity=0.5), jnp.array([-1.0, 0.9, -3.0, 2.0])
      >>> jax.jit(compressor.update)(x, compressor.init(x))[0].tolist()
      [0.0, 0.0, -3.0, 2.0]

    References:
      Sahu et al., Rethinking gradient sparsification as total error minimization, 2021.
    """
    check.static_positive("threshold", "value", value)
    check.ratio("threshold", "capacity", capacity)
    return Compressor(Threshold(float(value), float(capacity)))
