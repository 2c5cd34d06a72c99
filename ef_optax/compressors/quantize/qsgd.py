"""QSGD: random rounding to evenly spaced levels of a norm."""

from __future__ import annotations

from typing import Any

from ef_optax._numeric import check
from ef_optax._numeric.random import as_key
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._dithering import Dithering, _checked


def qsgd(
    states: int, key: Any = None, *, norm: str = "l2", bucket: int | None = None
) -> Compressor:
    """Uniform stochastic quantisation relative to a norm: QSGD.

    ``C(x)_i = N sign(x_i) l_i/s``, where N is the norm of the bucket, and l_i is ``s |x_i|/N``
    rounded at random to a neighbouring integer, so that E C(x) = x. Zeros stay zero.
    omega = min(B/s^2, sqrt(B)/s) for the 2-norm and buckets of length B (bound).

    Args:
      states: s, the number of positive levels; codes are -s..s, of ceil(log2(2s + 1)) bits.
      key: a JAX random key or an int; step, leaf and worker are folded in. The random numbers of a
        step are a hash of each value's index and 64 bits of the step's key (two rounds of
        MurmurHash3's finaliser). They cost a few operations per value, and are not cryptographic.
      norm: ``"l2"`` or ``"linf"`` (the largest magnitude).
      bucket: length B of the pieces with their own norm; None for one norm per leaf.

    Returns:
      The compressor. Bits: 32 ceil(d/B) + d ceil(log2(2s + 1)).

    Raises:
      ValueError: for a bad ``states``, ``norm`` or ``bucket``. TypeError: without a key.

    Example:
      It is exact if every value is a multiple of N/s, as for (2, 3, 6) with norm 7:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.qsgd(7, key=0)
      >>> compressor.update(jnp.array([2.0, 3.0, 6.0]), compressor.init(None))[0].tolist()
      [2.0, 3.0, 6.0]
      >>> compressor.bits((1000,)), round(compressor.codec.omega(49), 6)
      (4032, 1.0)

    References:
      Alistarh, Grubic, Li, Tomioka, Vojnovic, QSGD, 2017, section 3.1 and Lemma 3.1.
    """
    _checked("qsgd", states, norm)
    check.count("qsgd", "bucket", bucket, optional=True)
    return Compressor(Dithering(as_key(key, "qsgd"), states, norm, bucket))
