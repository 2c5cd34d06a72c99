"""Codecs that take several large leaves together."""

from __future__ import annotations

import abc
from collections.abc import Hashable

import jax

from ef_optax._core.codec import Codec


class Joinable(Codec):
    """A codec of single leaves that can handle several large ones in one program.

    Equal small leaves are stacked; this is for leaves that are too large to be copied. Each gets
    what it would get alone.
    """

    @abc.abstractmethod
    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """Equal for large leaves that are taken together; None for a leaf that stays alone."""

    @abc.abstractmethod
    def joint(self) -> Codec:
        """The codec of a list of leaves of one family; its granularity is ``"group"``."""
