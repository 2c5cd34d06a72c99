"""Codecs that have no message of one worker's one leaf: an exchange, a step or a leaf makes it."""

from __future__ import annotations

from typing import ClassVar

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.requests import Message
from ef_optax._numeric.dtypes import Array


class MessagelessCodec(Codec):
    """A codec whose ``encode`` and ``decode`` do not exist; subclasses say why."""

    why: ClassVar[str]  # the end of the sentence "... has no encode of its own: "

    def encode(self, x: Array, key: Array | None = None) -> Message:
        raise self.refusal("encode")

    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        raise self.refusal("decode")

    def refusal(self, what: str) -> TypeError:
        """The error for whoever asks for it."""
        return TypeError(f"{type(self).__name__} has no {what} of its own: {self.why}")
