"""Top-k by a threshold that is estimated from a sample (DGC)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.magnitude import magnitude_order
from ef_optax._select.leaf import top_k_indices
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._threshold import ThresholdCodec, _passing


@dataclasses.dataclass(frozen=True)
class SampledTopK(ThresholdCodec):
    """DGC's threshold from a strided sample, lowered until enough values pass."""

    ratio: float
    sample: float

    upper: ClassVar[float] = 1.3
    lower: ClassVar[float] = 0.8
    rounds: ClassVar[int] = 10

    def count(self, size: int) -> int:
        return min(size, math.floor(self.upper * resolve_k(self.ratio, None, size)))

    def kept(self, size: int) -> int:
        return resolve_k(self.ratio, None, size)

    def border(self, flat: Array) -> Array:
        sample = flat[:: max(1, min(flat.size // 2, math.floor(1 / self.sample)))]
        largest = top_k_indices(sample, resolve_k(self.ratio, None, sample.size))
        first = jnp.min(jnp.abs(sample[largest]))
        enough = math.ceil(self.lower * resolve_k(self.ratio, None, flat.size))

        def too_few(state: tuple[Array, Array]) -> Array:
            rounds, threshold = state
            few = _passing(flat, magnitude_order(threshold)) < enough
            return (rounds < self.rounds) & few

        def lowered(state: tuple[Array, Array]) -> tuple[Array, Array]:
            rounds, threshold = state
            return rounds + 1, threshold * jnp.asarray(0.8, threshold.dtype)

        start = (first * 0).astype(jnp.int32)  # typed like the data, for loops inside maps
        _, threshold = jax.lax.while_loop(too_few, lowered, (start, first))
        return jnp.maximum(magnitude_order(threshold), 1)


def sampled_top_k(ratio: float, *, sample: float = 0.01) -> Compressor:
    """DGC's approximate top-k: a threshold from a sample, for 0.8 k to 1.3 k values.

    The sample is every s-th magnitude, s = floor(1/sample), and the threshold is the sample's
    quantile at 1 - ratio. While fewer than 0.8 k values pass, the threshold is multiplied by 0.8,
    at most ten times. If more than 1.3 k values pass, the k largest of them are sent. Zeros are
    never sent. There is no contraction constant: ten rounds lower the threshold by a factor of 9,
    and some leaves need more.

    Args:
      ratio: target share in (0, 1].
      sample: share of the leaf that is sampled, in (0, 1].

    Returns:
      The compressor. Bits: 32 + floor(1.3 k) (32 + ceil(log2 d)).

    Raises:
      ValueError: for a bad ``ratio`` or ``sample``.

    Example:
      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.sampled_top_k(0.1, sample=0.1)
      >>> x = np.random.default_rng(0).normal(size=1000).astype("f4")
      >>> sent, _ = jax.jit(compressor.update)(x, compressor.init(x))
      >>> 80 <= len(np.flatnonzero(sent)) <= 130
      True

    References:
      Lin, Han, Mao, Wang, Dally, Deep gradient compression, 2018, section 5, and the authors'
      public implementation.
    """
    check.ratio("sampled_top_k", "ratio", ratio)
    check.ratio("sampled_top_k", "sample", sample)
    return Compressor(SampledTopK(float(ratio), float(sample)))
