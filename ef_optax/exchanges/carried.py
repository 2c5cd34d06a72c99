"""A codec and the transport that carries its messages, checked against each other.

A transport (:class:`ef_optax.extend.Transport`) declares what it needs of a codec (``needs``), the
properties of the pair (``traits``), and how many bits travel (``traffic``). The codec of the pair
is defined here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.need import Need
from ef_optax._core.outcome import Protocol
from ef_optax._core.traits import Traits
from ef_optax._core.transport import Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor
from ef_optax.compressors.sparse._sparse import Followable, SparseCodec

SPARSE = Need(
    lambda codec: isinstance(codec, SparseCodec),
    "does not send indices and values, but the transport merges these on the way",
    "choose a sparsifier such as top_k or block_top_k",
)
FOLLOWABLE = Need(
    lambda codec: isinstance(codec, Followable),
    "does not send plain values at positions that one worker can choose for all",
    "choose a sparsifier such as top_k or block_top_k",
)


@dataclasses.dataclass(frozen=True)
class Carried(MessagelessCodec):
    """``inner``, whose messages travel by the transport ``via`` instead of their own."""

    inner: Codec
    via: Transport

    why: ClassVar[str] = "its message is that of codec.inner. Ask codec.inner."

    @property
    def name(self) -> str:
        return f"{self.inner.name} by {type(self.via).__name__}"

    @property
    def traits(self) -> Traits:
        return self.via.traits(self.inner)

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        del path
        return self.via.init(self.inner, like, num_workers)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        return self.via.run(self.inner, x, state, workers)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        return self.via.traffic(self.inner, shape, dtype, num_workers)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Bits that one worker alone sends in all rounds; see :meth:`traffic` for several."""
        return sum(self.traffic(shape, dtype, 1))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        return self.via.alpha(self.inner, shape, num_workers)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        return self.inner.omega(shape, num_workers) if self.unbiased else None

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        return self.via.noise_error(self.inner, shape, num_workers)


def carried(name: str, compressor: Compressor, transport: Transport) -> Compressor:
    """The compressor whose messages travel by this transport.

    Every transport of :mod:`ef_optax.exchanges` calls it, and so does one of your own.

    Args:
      name: the name of the calling function, for its error messages.
      compressor: what is sent; a stateless compressor of single leaves, whose message one worker
        encodes alone, and which has what ``transport.needs`` asks for.
      transport: how it travels.

    Returns:
      The compressor. Any rule takes it, and :func:`ef_optax.per_leaf` can choose it for some
      leaves.

    Raises:
      TypeError: if ``compressor`` is not such a Compressor.
      ValueError: if it lacks what the transport needs.

    Example:
      >>> import ef_optax as ef
      >>> from ef_optax.extend import AllReduce
      >>> carried("reduce", ef.top_k(0.01), AllReduce()).bits((100,))
      3200
    """
    codec = single_codec(compressor, name, "compressor")
    for need in transport.needs:
        need.check(f"{name}: compressor", codec)
    return Compressor(Carried(codec, transport))
