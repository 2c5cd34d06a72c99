"""Signs times the root mean square: the one-bit operator of the 1-bit Adam family."""

from __future__ import annotations

import dataclasses
import math

from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.norms import leaf_norm
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._sign import SignCodec


@dataclasses.dataclass(frozen=True)
class RmsSign(SignCodec):
    """``C(x) = (||x||_2 / sqrt(d)) sign(x)`` with sign(0) = +1, which has the norm of x."""

    def scale(self, x: Array) -> Array:
        return leaf_norm(x.astype(wide_dtype(x.dtype)), "l2") / math.sqrt(max(1, x.size))


def rms_sign() -> Compressor:
    """Signs times the root mean square: ``C(x) = (||x||_2 / sqrt d) sign(x)``, sign(0) = +1.

    The error is ``||x||_2 sqrt(2 (1 - phi))`` with ``phi = ||x||_1 / (sqrt(d) ||x||_2)``. It is
    smaller than x only if phi > 1/2, so there is **no contraction constant**. The 1-bit Adam family
    uses it; for anything else take :func:`ef_optax.scaled_sign`, whose error is smaller.

    Returns:
      The compressor. Bits: d + 32.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.rms_sign()
      >>> compressor.update(jnp.array([1.0, -7.0]), compressor.init(None))[0].tolist()
      [5.0, -5.0]

    References:
      Tang et al., 1-bit Adam, 2021, section 4 and its public implementation in DeepSpeed.
    """
    return Compressor(RmsSign())
