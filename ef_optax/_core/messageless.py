"""Codecs in which a single worker's leaf has no message."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.outcome import Protocol
from ef_optax._core.requests import Message
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array


class MessagelessCodec(Codec):
    """A codec without ``encode`` and ``decode``; the workers make its message in its protocol.

    Subclasses define ``protocol`` and ``bits``, and say in ``why`` what to use instead.
    """

    why: ClassVar[str] = (  # the end of the sentence "... has no encode of its own: "
        "the workers make its message together. Use it in error_feedback or compressed_mean."
    )

    def encode(self, x: Array, key: Array | None = None) -> Message:
        raise self.refusal("encode")

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        raise self.refusal("decode")

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        raise self.refusal("protocol")

    def refusal(self, what: str) -> TypeError:
        """The error for a caller of ``what``."""
        return TypeError(f"{type(self).__name__} has no {what} of its own: {self.why}")
