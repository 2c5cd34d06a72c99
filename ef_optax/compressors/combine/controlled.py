"""A compressor with several levels, of which a controller chooses one in the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.control import Controller, LevelPolicy
from ef_optax._core.once import identity_of
from ef_optax._core.policy import StepPolicy, for_leaf
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine.scheduled import Scheduled
from ef_optax.compressors.compressor import Compressor, codec_of


@dataclasses.dataclass(frozen=True)
class Controlled(Scheduled, LevelPolicy):
    """A schedule whose clock is a level, which a controller chooses, and not the step."""

    controller: Controller = dataclasses.field(kw_only=True)

    why: ClassVar[str] = (
        "its codec is chosen while the program runs. Ask codec.at(level), or make the controller "
        "the outermost compressor."
    )

    @classmethod
    def of(cls, levels: Sequence[Compressor], controller: Controller) -> Controlled:
        """The codec of these levels, one of which the controller chooses.

        Raises:
          TypeError: if a level is not a compressor. ValueError: if there are none.
        """
        codecs = tuple(codec_of(level, f"compressors[{i}]") for i, level in enumerate(levels))
        if not codecs:
            raise ValueError("compressors is empty; give at least one.")
        return cls(tuple(range(len(codecs))), codecs, controller=controller)

    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        """The leaf's own levels, or its codec if all levels have the same (dense leaves)."""
        codecs = tuple(for_leaf(codec, path, like) for codec in self.codecs)
        for codec in codecs:
            if isinstance(codec, StepPolicy):
                raise ValueError(
                    f"a level has {codec.name} for the leaf {path!r}, which changes by itself; "
                    "give levels that do not, because the controller alone decides."
                )
        if len({identity_of(codec) for codec in codecs}) == 1:
            return codecs[0]
        return dataclasses.replace(self, codecs=codecs)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """The most bits of any level; ask ``at(level)`` for one."""
        return max(codec.bits(shape, dtype) for codec in self.codecs)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        largest = max(self.codecs, key=lambda codec: codec.bits(shape, dtype))
        return largest.traffic(shape, dtype, num_workers)
