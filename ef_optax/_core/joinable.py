"""Codecs that can handle leaves of different shapes together."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.traits import Traits
from ef_optax._numeric.shapes import Shape


class Joinable(Codec):
    """A codec of single leaves that can handle several leaves in one program.

    Equal small leaves are stacked; this class is for small leaves of different shapes, and for
    leaves that are too large to be copied. The result for each leaf is the same as alone.
    """

    @abc.abstractmethod
    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """A value that leaves share if they are handled together; None for a single leaf."""

    @abc.abstractmethod
    def joint(self, like: jax.ShapeDtypeStruct) -> JointCodec:
        """The codec of a list of leaves of the family of ``like``."""

    def copied(self, like: jax.ShapeDtypeStruct) -> bool:
        """Whether it copies large leaves like this one into one vector, whose size is limited."""
        del like
        return False


@dataclasses.dataclass(frozen=True)
class JointCodec(MessagelessCodec):
    """What a `Joinable` codec, ``inner``, becomes for a list of leaves of one family."""

    inner: Any

    why: ClassVar[str] = "it takes the leaves of a family together. Ask codec.inner."

    @property
    def traits(self) -> Traits:
        return Traits(granularity="group")

    def bits(self, shape: Shape, dtype: Any = None) -> int:
        raise AssertionError("a family is never asked for bits; its leaves' codec is")
