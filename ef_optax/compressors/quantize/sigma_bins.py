"""Bins of equal width around the mean, measured in standard deviations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ef_optax._numeric import check
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.norms import leaf_norm, power_of_two
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.quantize._codebook import CodebookCodec


@dataclasses.dataclass(frozen=True)
class SigmaBins(CodebookCodec):
    """2^width bins of equal length around the mean, which cover ``sigmas`` standard deviations."""

    width: int
    sigmas: float = 6.0
    means_dtype: str | None = None

    def means_in(self, dtype: Any) -> Any:
        return super().means_in(dtype) if self.means_dtype is None else self.means_dtype

    @property
    def count(self) -> int:
        return 2**self.width

    def bins(self, x: Array) -> Array:
        scaled = x / power_of_two(leaf_norm(x, "linf"))
        centred = scaled - jnp.mean(scaled)
        deviation = jnp.sqrt(jnp.sum(jnp.square(centred)) / max(1, x.size - 1))
        length = safe_divisor(deviation * (self.sigmas / self.count))
        code = jnp.round(centred / length + self.count // 2)
        return jnp.clip(code, 0, self.count - 1).astype(jnp.int32)


def sigma_bins(bits: int, *, sigmas: float = 6.0, means_dtype: Any = None) -> Compressor:
    """2^bits bins of equal length around the mean, each decoded as the mean of its members.

    The length of a bin is ``sigmas`` times the standard deviation (divisor d - 1) over 2^bits. A
    value goes to bin round((x - mean)/length + 2^(bits-1)), clamped to the first and the last bin.
    With 2 bits it quantises the values of SparseLoCo's messages; with 8 bits it is hivemind's
    uniform quantiser. It is biased, and no contraction constant is known.

    Args:
      bits: bits of a value, 1 to 16.
      sigmas: how many standard deviations the bins cover.
      means_dtype: the dtype in which the means travel: ``"bfloat16"``, ``"float16"``, or None for
        float32.

    Returns:
      The compressor. Bits: bits d + 32 2^bits (16 2^bits with means of 16 bits).

    Raises:
      ValueError: for a bad ``bits``, ``sigmas`` or ``means_dtype``.

    Example:
      Top-k with 2-bit values has 12 bits of index and 2 bits of value for each of 41 entries:

      >>> import ef_optax as ef
      >>> ef.compose(ef.sigma_bins(2), ef.top_k(0.01)).bits((4096,))
      702
      >>> narrow = ef.sigma_bins(2, means_dtype="bfloat16")
      >>> round(32 * 4096 / ef.compose(narrow, ef.block_top_k(0.01)).bits((4096,)))
      205

    References:
      Sarfi et al., SparseLoCo, 2025 (2 bits); the hivemind library (8 bits).
    """
    check.count("sigma_bins", "bits", bits, least=1, most=16)
    check.static_positive("sigma_bins", "sigmas", sigmas)
    narrow = None if means_dtype is None else jnp.dtype(means_dtype).name
    if narrow not in (None, "bfloat16", "float16"):
        raise ValueError(
            f"sigma_bins: means_dtype={means_dtype!r} must be 'bfloat16', 'float16' or None."
        )
    return Compressor(SigmaBins(bits, float(sigmas), narrow))
