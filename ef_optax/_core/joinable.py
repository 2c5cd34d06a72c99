"""Codecs that can handle leaves of different shapes together."""

from __future__ import annotations

import abc
from collections.abc import Hashable

import jax

from ef_optax._core.codec import Codec


class Joinable(Codec):
    """A codec of single leaves that can handle several leaves in one program.

    Equal small leaves are stacked; this class is for small leaves of different shapes, and for
    leaves that are too large to be copied. The result for each leaf is the same as alone.
    """

    @abc.abstractmethod
    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """A value that leaves share if they are handled together; None for a single leaf."""

    @abc.abstractmethod
    def joint(self, like: jax.ShapeDtypeStruct) -> Codec:
        """The codec of a list of leaves of the family of ``like``, of granularity ``"group"``."""
