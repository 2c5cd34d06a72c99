"""Codecs that stand for others: which one works depends on the leaf, on the step, or on both.

The exchange resolves them once, before any protocol runs: first each leaf's codec
(:func:`for_leaf`), then the stages it goes through (:func:`stages_of`). A codec that is neither
kind of policy knows nothing of this.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Stage:
    """A codec that works for a while.

    Attributes:
      codec: which one.
      slot: where its own state lies in that of the leaf: the number of an entry, of an entry in
        that one, and so on; empty if the whole state is its own.
    """

    codec: Codec
    slot: tuple[int, ...] = ()

    def own(self, state: Any) -> Any:
        """This codec's part of the leaf's state."""
        for number in self.slot:
            state = state[number]
        return state

    def replaced(self, state: Any, new: Any) -> Any:
        """The leaf's state with ``new`` as this codec's part."""
        return _replaced(state, self.slot, new)


def _replaced(state: Any, slot: tuple[int, ...], new: Any) -> Any:
    if not slot:
        return new
    number, *rest = slot
    inner = _replaced(state[number], tuple(rest), new)
    return *state[:number], inner, *state[number + 1 :]


@dataclasses.dataclass(frozen=True)
class Stages:
    """What one leaf's codec is in the course of time: a stage for each start of the timeline."""

    timeline: Timeline
    stages: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """The stage that exchange number ``step`` lies in."""
        return self.stages[self.timeline.number(step)]


class LeafPolicy(Codec):
    """A codec that depends on the leaf."""

    @abc.abstractmethod
    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        """The codec that is used for this leaf."""


class StepPolicy(Codec):
    """A codec that depends on the step."""

    @property
    @abc.abstractmethod
    def stages(self) -> Stages:
        """The codecs one after the other, and when each of them works."""

    def at(self, step: int) -> Codec:
        """The codec that is used in exchange number ``step``."""
        return self.stages.at(step).codec


def for_leaf(codec: Codec, path: str, like: jax.ShapeDtypeStruct) -> Codec:
    """The codec that is used for this leaf: the codec itself, or a policy's choice."""
    return codec.for_leaf(path, like) if isinstance(codec, LeafPolicy) else codec


def stages_of(codec: Codec) -> Stages:
    """The stages of one leaf's codec; a single one if it does not change."""
    return codec.stages if isinstance(codec, StepPolicy) else Stages(Timeline(), (Stage(codec),))
