"""Quantile sketch of SketchML: bins with equally many entries, and their means."""

from __future__ import annotations

from ef_optax._numeric import check
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._codebook import QuantileBins


def quantile_sketch(quantiles: int) -> Compressor:
    """SketchML's quantile-bucket quantisation: q bins, each decoded as the mean of its members.

    Bins lie between the q-quantiles of the leaf, which are exact and not sketched. They are closed
    below, and the last one also above. It is biased, and no contraction constant is known. It does
    not include SketchML's coding of sparse keys.

    Args:
      quantiles: number of bins q, 2 to 65536.

    Returns:
      The compressor. Bits: d ceil(log2 q) + 32 q.

    Raises:
      ValueError: for a bad ``quantiles``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.quantile_sketch(2)
      >>> compressor.update(jnp.array([1.0, 2.0, 5.0, 7.0]), compressor.init(None))[0].tolist()
      [1.5, 1.5, 6.0, 6.0]

    References:
      Jiang, Fu, Yang, Cui, SketchML, 2018, section 3.2.
    """
    check.count("quantile_sketch", "quantiles", quantiles, least=2, most=65536)
    return Compressor(QuantileBins(quantiles, "below"))
