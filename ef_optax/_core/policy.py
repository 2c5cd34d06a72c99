"""Policies: codecs that choose another codec by the leaf, the number of workers, or the step.

The exchange resolves them once, before any protocol runs: first the codec of each leaf
(:func:`for_leaf`), then that for its workers (:func:`for_workers`), then the stages of this codec
(:func:`stages_of`). Codecs that are not policies are not concerned.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from ef_optax._core.codec import Codec
from ef_optax._core.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Stage:
    """A codec that is used for some time.

    Attributes:
      codec: the codec.
      slot: the position of its state in the state of the leaf: the index of an entry, of an entry
        in that one, and so on; empty if the state of the leaf is its own.
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
    """The codecs of one leaf over time: a stage for each start of the timeline."""

    timeline: Timeline
    stages: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """The stage of exchange number ``step``."""
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
        """The successive codecs, and when each of them is used."""

    def at(self, step: int) -> Codec:
        """The codec that is used in exchange number ``step``."""
        return self.stages.at(step).codec


class WorkersPolicy(Codec):
    """A codec that depends on the number of workers, and on the leaf's shape and dtype."""

    @abc.abstractmethod
    def for_workers(self, like: jax.ShapeDtypeStruct, num_workers: int) -> Codec:
        """The codec that is used for such a leaf between so many workers."""


def for_leaf(codec: Codec, path: str, like: jax.ShapeDtypeStruct) -> Codec:
    """The codec that is used for this leaf: the codec itself, or a policy's choice."""
    return codec.for_leaf(path, like) if isinstance(codec, LeafPolicy) else codec


def for_workers(codec: Codec, like: jax.ShapeDtypeStruct, num_workers: int) -> Codec:
    """The codec that is used between so many workers: the codec itself, or a policy's choice."""
    return codec.for_workers(like, num_workers) if isinstance(codec, WorkersPolicy) else codec


def for_leaves(
    codec: Codec, paths: Sequence[str], likes: Sequence[jax.ShapeDtypeStruct], num_workers: int
) -> list[Codec]:
    """The codecs that are used for these leaves between so many workers."""
    own = [(for_leaf(codec, path, like), like) for path, like in zip(paths, likes, strict=True)]
    return [for_workers(one, like, num_workers) for one, like in own]


def stages_of(codec: Codec) -> Stages:
    """The stages of one leaf's codec; a single stage if it does not change."""
    return codec.stages if isinstance(codec, StepPolicy) else Stages(Timeline(), (Stage(codec),))
