"""Linear dithering: QSGD relative to the largest magnitude."""

from __future__ import annotations

from typing import Any

from ef_optax._numeric.random import as_key
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._dithering import Dithering, _checked


def linear_dithering(levels: int, key: Any = None, *, norm: str = "linf") -> Compressor:
    """QSGD's quantiser on whole leaves, relative to the largest magnitude by default.

    ``C(x)_i = N sign(x_i) l_i/s`` as in :func:`ef_optax.qsgd`, without buckets. For the linf norm
    omega = (sqrt(d) - 1)/2 for s = 1 (exact), else min((d-1)/(4 s^2), sqrt(d-1)/(2 s)) (bound).

    Args:
      levels: s, the number of positive levels.
      key: a JAX random key or an int; step, leaf and worker are folded in.
      norm: ``"linf"`` or ``"l2"``.

    Returns:
      The compressor. Bits: 32 + d ceil(log2(2s + 1)).

    Raises:
      ValueError: for a bad ``levels`` or ``norm``. TypeError: without a key.

    Example:
      >>> import ef_optax as ef
      >>> ef.linear_dithering(1, key=0).codec.omega(4)
      0.5

    References:
      Horvath, Ho, Horvath, Sahu, Canini, Richtarik, Natural compression, 2022, Definition 3.
    """
    _checked("linear_dithering", levels, norm)
    return Compressor(Dithering(as_key(key, "linear_dithering"), levels, norm))
