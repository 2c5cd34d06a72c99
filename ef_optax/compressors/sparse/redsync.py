"""RedSync's trimmed top-k: a threshold between mean and maximum."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, wide_dtype
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._numeric.norms import leaf_norm, leaf_sums
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._threshold import ThresholdCodec, _passing


@dataclasses.dataclass(frozen=True)
class RedSync(ThresholdCodec):
    """A threshold between the mean and the largest magnitude, found by bisection."""

    ratio: float

    def count(self, size: int) -> int:
        return min(size, 2 * resolve_k(self.ratio, None, size))

    def border(self, flat: Array) -> Array:
        k, wide = resolve_k(self.ratio, None, flat.size), flat.astype(wide_dtype(flat.dtype))
        mean = (leaf_sums(jnp.abs(wide))[0] / flat.size).astype(flat.dtype)
        largest = leaf_norm(wide, "linf").astype(flat.dtype)
        low, high = jnp.zeros((), flat.dtype), jnp.ones((), flat.dtype)
        found, threshold = jnp.zeros((), bool), largest
        for _ in range(3):  # the interval [0, 1] is halved while it is longer than 0.2
            middle = (low + high) / 2
            trial = mean + middle * (largest - mean)
            threshold = jnp.where(found, threshold, trial)
            passed = _passing(flat, magnitude_order(trial) + 1)
            found = found | ((passed > k) & (passed < 2 * k))
            too_few = 2 * passed < k
            low, high = jnp.where(too_few, low, middle), jnp.where(too_few, middle, high)
        return magnitude_order(threshold) + 1


def redsync(ratio: float) -> Compressor:
    """RedSync's threshold: three bisections between the mean and the largest magnitude.

    t = mean + r (max - mean), with r = 1/2 at first. The search stops as soon as between k and 2k
    values are above t; r goes down if fewer than k/2 are, else up. The values above the last t are
    sent, at most the 2k largest. No contraction constant is known.

    Args:
      ratio: target share in (0, 1]; k = ceil(ratio d).

    Returns:
      The compressor. Bits: 32 + min(d, 2k) (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``ratio``.

    Example:
      >>> import ef_optax as ef, jax, jax.numpy as jnp
      >>> compressor, x = ef.redsync(0.25), jnp.array([1.0, 9.0, -8.0, 0.0])
      >>> jax.jit(compressor.update)(x, compressor.init(x))[0].tolist()
      [0.0, 9.0, 0.0, 0.0]

    References:
      Fang, Fu, Yang, Hsieh, RedSync, 2019, Algorithm 3 (threshold binary search selection).
    """
    check.ratio("redsync", "ratio", ratio)
    return Compressor(RedSync(float(ratio)))
