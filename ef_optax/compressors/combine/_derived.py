"""Codecs made of other codecs: they have the properties that all of their parts have."""

from __future__ import annotations

import abc

from ef_optax._core.codec import Codec, joint_basis


class DerivedCodec(Codec):
    """A codec whose declared properties follow from those of ``components``."""

    @property
    @abc.abstractmethod
    def components(self) -> tuple[Codec, ...]:
        """The codecs that this one is made of."""

    @property
    def unbiased(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.unbiased for codec in self.components)

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.linear for codec in self.components)

    @property
    def homogeneous(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.homogeneous for codec in self.components)

    @property
    def deterministic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.deterministic for codec in self.components)

    @property
    def additive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.additive for codec in self.components)

    @property
    def independent(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(codec.independent for codec in self.components)

    @property
    def basis(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return joint_basis(*self.components)
