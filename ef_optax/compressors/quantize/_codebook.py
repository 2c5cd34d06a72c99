"""Codecs that sort values into bins, and decode each bin as the mean of its members."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._bits import fields
from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._numeric.division import safe_divisor
from ef_optax._numeric.dtypes import Array, bits_of, scale_dtype
from ef_optax._numeric.order_statistics import order_statistics
from ef_optax._numeric.shapes import Shape, bits_for, size_of


class CodebookCodec(Codec):
    """Sends a bin number for each value and a mean for each bin; subclasses choose the bins.

    Replacing values by the mean of their bin is a projection, so C(x) is never longer than x.
    """

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """Number of bins."""

    @abc.abstractmethod
    def bins(self, x: Array) -> Array:
        """The bin, from 0 to count - 1, of each value of a flat leaf that is not empty."""

    def encode(self, x: Array, key: Array | None = None) -> Message:
        del key
        flat = x.reshape(-1).astype(scale_dtype(x.dtype))
        codes = self.bins(flat) if flat.size else jnp.zeros(0, jnp.int32)
        sums = jnp.zeros(self.count, flat.dtype).at[codes].add(flat)
        members = jnp.zeros(self.count, flat.dtype).at[codes].add(jnp.ones((), flat.dtype))
        means = (sums / safe_divisor(members)).astype(self.means_in(x.dtype))
        return {"codes": fields.pack(codes, self._width), "means": means}

    def means_in(self, dtype: Any) -> Any:
        """The dtype in which the means travel."""
        return scale_dtype(dtype)

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        codes = fields.unpack(message["codes"], self._width, size_of(like.shape))
        return message["means"][codes].astype(like.dtype).reshape(like.shape)

    @property
    def _width(self) -> int:
        return bits_for(self.count)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return size_of(shape) * self._width + self.count * bits_of(self.means_in(dtype))


@dataclasses.dataclass(frozen=True)
class QuantileBins(CodebookCodec):
    """Bins between the quantiles 1/q, 2/q, ... of the leaf, with about equally many values each."""

    quantiles: int
    closed: str  # which end of a bin belongs to it: "below" or "above"

    @property
    def count(self) -> int:
        return self.quantiles

    def bins(self, x: Array) -> Array:
        positions = np.arange(1, self.quantiles) / self.quantiles * (x.size - 1)
        low = np.floor(positions).astype(np.int32)
        fraction = jnp.asarray(positions - low, x.dtype)
        ranks = np.unique(np.concatenate([low, np.minimum(low + 1, x.size - 1)]))
        ordered = order_statistics(x, ranks)
        below = ordered[np.searchsorted(ranks, low)]
        above = ordered[np.searchsorted(ranks, np.minimum(low + 1, x.size - 1))]
        borders = below + (above - below) * fraction
        side = "right" if self.closed == "below" else "left"
        return jnp.searchsorted(borders, x, side=side, method="scan_unrolled")
