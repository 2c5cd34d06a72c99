"""Values sorted into bins, each bin decoded as the mean of its members."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax import _check, _fields, _packing
from ef_optax._base import Array, Codec, Message, Shape, bits_of, size_of
from ef_optax._compressor import Compressor
from ef_optax.compressors._blocks import safe_divisor
from ef_optax.compressors._norms import leaf_norm, power_of_two
from ef_optax.compressors._order_statistics import order_statistics
from ef_optax.compressors.sign import scale_dtype


class CodebookCodec(Codec):
    """A bin number for each value and one mean for each bin; subclasses choose the bins.

    Replacing values by the mean of their bin is a projection, so C(x) is never longer than x.
    """

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """Number of bins."""

    @abc.abstractmethod
    def bins(self, x: Array) -> Array:
        """The bin, 0 .. count - 1, of each value of a flat leaf that is not empty."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1).astype(scale_dtype(x.dtype))
        codes = self.bins(flat) if flat.size else jnp.zeros(0, jnp.int32)
        sums = jnp.zeros(self.count, flat.dtype).at[codes].add(flat)
        members = jnp.zeros(self.count, flat.dtype).at[codes].add(jnp.ones((), flat.dtype))
        means = (sums / safe_divisor(members)).astype(self.means_in(x.dtype))
        return {"codes": _fields.pack(codes, self._width), "means": means}

    def means_in(self, dtype: Any) -> Any:
        """The dtype in which the means travel."""
        return scale_dtype(dtype)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = _fields.unpack(message["codes"], self._width, size_of(like.shape))
        return message["means"][codes].astype(like.dtype).reshape(like.shape)

    @property
    def _width(self) -> int:
        return _packing.bits_for(self.count)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * self._width + self.count * bits_of(self.means_in(dtype))


@dataclasses.dataclass(frozen=True)
class QuantileBins(CodebookCodec):
    """Bins between the quantiles 1/q, 2/q, ... of the leaf: about equally many values each."""

    quantiles: int
    closed: str  # which end of a bin belongs to it: "below" or "above"

    @property
    def count(self) -> int:
        return self.quantiles

    def bins(self, x: Array) -> Array:
        places = np.arange(1, self.quantiles) / self.quantiles * (x.size - 1)
        low = np.floor(places).astype(np.int32)
        fraction = jnp.asarray(places - low, x.dtype)
        ranks = np.unique(np.concatenate([low, np.minimum(low + 1, x.size - 1)]))
        ordered = order_statistics(x, ranks)
        below = ordered[np.searchsorted(ranks, low)]
        above = ordered[np.searchsorted(ranks, np.minimum(low + 1, x.size - 1))]
        borders = below + (above - below) * fraction
        side = "right" if self.closed == "below" else "left"
        return jnp.searchsorted(borders, x, side=side, method="scan_unrolled")


@dataclasses.dataclass(frozen=True)
class SigmaBins(CodebookCodec):
    """2^width bins of equal length around the mean, ``sigmas`` standard deviations in all."""

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


def quantile_8bit() -> Compressor:
    """256 bins between the quantiles of the leaf, each decoded as the mean of its members.

    A value's code is the number of the 255 inner quantiles (linear interpolation) below it. Biased;
    C(x) is never longer than x, no contraction constant is known. The quantiles are exact.

    Returns:
      The compressor. Bits: 8 d + 8192.

    Example:
      Up to 256 different values of equal number are kept:

      >>> import ef_optax as ef, jax.numpy as jnp
      >>> compressor = ef.quantile_8bit()
      >>> compressor.update(jnp.array([0.5, -2.0, 7.0]), compressor.init(None))[0].tolist()
      [0.5, -2.0, 7.0]

    References:
      Ryabinin et al., Moshpit SGD, 2021 (the quantiser of the hivemind library).
    """
    return Compressor(QuantileBins(256, "above"))


def quantile_sketch(quantiles: int) -> Compressor:
    """SketchML's quantile-bucket quantisation: q bins, each decoded as the mean of its members.

    Bins lie between the q-quantiles of the leaf (exact ones, not sketched), closed below, the last
    also above. Biased; no contraction constant is known. SketchML's coding of sparse keys is not
    part of it.

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
    _check.count("quantile_sketch", "quantiles", quantiles, least=2, most=65536)
    return Compressor(QuantileBins(quantiles, "below"))


def sigma_bins(bits: int, *, sigmas: float = 6.0, means_dtype: Any = None) -> Compressor:
    """2^bits bins of equal length around the mean, each decoded as the mean of its members.

    The bins have length ``sigmas`` times the standard deviation (divisor d - 1) over 2^bits; a
    value goes to bin round((x - mean)/length + 2^(bits-1)), clamped to the first and last. With 2
    bits it quantises the values of SparseLoCo's messages, with 8 it is hivemind's uniform
    quantiser. Biased; no contraction constant is known.

    Args:
      bits: bits of a value, 1 to 16.
      sigmas: how many standard deviations the bins cover.
      means_dtype: in which the means travel: ``"bfloat16"``, ``"float16"``, or None for float32.

    Returns:
      The compressor. Bits: bits d + 32 2^bits (16 2^bits with narrow means).

    Raises:
      ValueError: for a bad ``bits``, ``sigmas`` or ``means_dtype``.

    Example:
      Top-k in blocks with 2-bit values: 12 bits of index and 2 of value for each of 41.

      >>> import ef_optax as ef
      >>> ef.compose(ef.sigma_bins(2), ef.top_k(0.01)).bits((4096,))
      702
      >>> narrow = ef.sigma_bins(2, means_dtype="bfloat16")
      >>> round(32 * 4096 / ef.compose(narrow, ef.block_top_k(0.01)).bits((4096,)))
      205

    References:
      Sarfi et al., SparseLoCo, 2025 (2 bits); the hivemind library (8 bits).
    """
    _check.count("sigma_bins", "bits", bits, least=1, most=16)
    _check.static_positive("sigma_bins", "sigmas", sigmas)
    narrow = None if means_dtype is None else jnp.dtype(means_dtype).name
    if narrow not in (None, "bfloat16", "float16"):
        raise ValueError(
            f"sigma_bins: means_dtype={means_dtype!r} must be 'bfloat16', 'float16' or None."
        )
    return Compressor(SigmaBins(bits, float(sigmas), narrow))
