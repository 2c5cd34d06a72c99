"""8-bit quantiles: 256 bins with equally many entries."""

from __future__ import annotations

from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._codebook import QuantileBins


def quantile_8bit() -> Compressor:
    """256 bins between the quantiles of the leaf, each decoded as the mean of its members.

    A value's code is the number of the 255 inner quantiles (linear interpolation) below it. The
    quantiles are exact. It is biased, C(x) is never longer than x, and no contraction constant is
    known.

    Returns:
      The compressor. Bits: 8 d + 8192.

    Example:
      Up to 256 different values, if all are equally frequent, are kept exactly:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.quantile_8bit()
      >>> compressor.update(jnp.array([0.5, -2.0, 7.0]), compressor.init(None))[0].tolist()
      [0.5, -2.0, 7.0]

    References:
      Ryabinin et al., Moshpit SGD, 2021 (the quantiser of the hivemind library).
    """
    return Compressor(QuantileBins(256, "above"))
