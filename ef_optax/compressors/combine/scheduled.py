"""A compressor that changes at given steps: a switch over whole exchanges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.once import identity_of
from ef_optax._core.policy import LeafPolicy, Stage, Stages, StepPolicy, for_leaf, stages_of
from ef_optax._core.timeline import Timeline, merged
from ef_optax._core.traits import Traits, common
from ef_optax._numeric import check
from ef_optax._numeric.shapes import Shape
from ef_optax.compressors.combine.identity import Identity
from ef_optax.compressors.compressor import Compressor, codec_of


@dataclasses.dataclass(frozen=True)
class Scheduled(MessagelessCodec, LeafPolicy, StepPolicy):
    """Codec j from exchange number starts[j] on, until the next one starts."""

    starts: tuple[int, ...]  # the first is 0
    codecs: tuple[Codec, ...]
    period: int | None = None  # after so many exchanges everything begins again

    why: ClassVar[str] = (
        "its codec depends on the step. Ask codec.at(step), or make the schedule the outermost "
        "compressor."
    )

    # -- which codec is used

    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        """The leaf's own schedule, or its codec if all stages have the same (dense leaves)."""
        codecs = tuple(for_leaf(codec, path, like) for codec in self.codecs)
        same = len({identity_of(codec) for codec in codecs}) == 1
        return codecs[0] if same else Scheduled(self.starts, codecs, self.period)

    @property
    def stages(self) -> Stages:
        own = [stages_of(codec) for codec in self.codecs]
        timeline = self._timeline([stages.timeline for stages in own])

        def stage(step: int) -> Stage:
            within = step if self.period is None else step % self.period
            number = sum(start <= within for start in self.starts) - 1
            one = own[number].at(step)
            return Stage(one.codec, (number, *one.slot)) if self.stateful else one

        return Stages(timeline, tuple(stage(step) for step in timeline.starts()))

    def _timeline(self, own: Sequence[Timeline]) -> Timeline:
        """When the codec changes: between two of them, or within the one that is used."""
        if self.period is not None:
            changes = Timeline((*self.starts[1:], self.period), 0, self.period)
            return merged([changes, *own])
        last = own[-1]
        settled = max(self.starts[-1], last.settled)
        ends = (*self.starts[1:], settled + last.period + 1)
        inner = [
            step
            for timeline, start, end in zip(own, self.starts, ends, strict=True)
            for step in timeline.between(start, end)
        ]
        return Timeline(tuple(sorted({*self.starts[1:], *inner})), settled, last.period)

    def init(self, like: Any, path: str, num_workers: int) -> tuple[Any, ...]:
        """The states of all codecs, of which only the active one changes; () if none has any."""
        if not self.stateful:
            return ()
        return tuple(codec.init(like, path, num_workers) for codec in self.codecs)

    # -- properties: those that hold in every stage

    @property
    def traits(self) -> Traits:
        shared = common(*(codec.traits for codec in self.codecs))
        return dataclasses.replace(shared, stateful=any(codec.stateful for codec in self.codecs))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """The least alpha of all stages."""
        known = [codec.alpha(shape, num_workers) for codec in self.codecs]
        return None if None in known else min(a for a in known if a is not None)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """The largest omega of all stages."""
        known = [codec.omega(shape, num_workers) for codec in self.codecs]
        return None if None in known else max(w for w in known if w is not None)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """The largest of all stages, because a memory must not grow in any of them."""
        return max(codec.noise_error(shape, num_workers) for codec in self.codecs)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Bits of the stage in which a run spends its time; ask ``at(step)`` for others."""
        return self._longest.bits(shape, dtype)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        return self._longest.traffic(shape, dtype, num_workers)

    @property
    def _longest(self) -> Codec:
        """The last codec, or the one that is used for most of a period."""
        if self.period is None:
            return self.codecs[-1]
        ends = (*self.starts[1:], self.period)
        lengths = [end - start for start, end in zip(self.starts, ends, strict=True)]
        return self.codecs[lengths.index(max(lengths))]


def delayed(start_step: int, codec: Codec) -> Compressor:
    """The codec from ``start_step`` on; before it every leaf is averaged without compression."""
    return Compressor(Scheduled((0, start_step), (Identity(), codec)) if start_step else codec)


def scheduled(
    boundaries: Sequence[int],
    compressors: Sequence[Compressor],
    *,
    period: int | None = None,
) -> Compressor:
    """Changes the compressor at given steps: warm-up, delayed start, a falling ratio or rank.

    The first compressor is used for the exchanges before ``boundaries[0]``, the next from there to
    ``boundaries[1]``, and so on. All of them are in one compiled program, as branches on the step
    count; only the branch that is taken is computed and travels. Inside :func:`ef_optax.per_leaf`
    each leaf may have its own schedule. Every distinct boundary adds one exchange to the program
    and to its compile time, so a warm-up should have only a few.

    Error feedback keeps its residual from stage to stage. A compressor with state keeps it too,
    unchanged while another one is active. The declared properties are those that all stages have;
    alpha is the least of all stages, and omega the largest.
    :meth:`bits <ef_optax.Compressor.bits>` are those of the last stage, or with a period of the
    longest one.

    Args:
      boundaries: increasing exchange numbers, from 1 up. Skipped steps, and steps without an
        exchange (local steps), do not count.
      compressors: one more than there are boundaries.
      period: the exchange, after the last boundary, at which the first compressor is used again,
        and so on every ``period`` exchanges. None for a schedule that ends in the last compressor.

    Returns:
      The compressor.

    Raises:
      ValueError: if the boundaries do not increase from 1, for another number of compressors, or
        if the period is not after the last boundary.
      TypeError: if one of them is not a Compressor.

    Example:
      One value in ten for two steps, then one in a hundred:

      >>> import ef_optax as ef, jax, numpy as np
      >>> compressor = ef.scheduled([2], [ef.top_k(0.1), ef.top_k(0.01)])
      >>> x, update = np.arange(1, 101, dtype="f4"), jax.jit(compressor.update)
      >>> state, kept = compressor.init(x), []
      >>> for _ in range(4):
      ...     sent, state = update(x, state)
      ...     kept.append(len(np.flatnonzero(sent)))
      >>> kept
      [10, 10, 1, 1]

    References:
      Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018 (warm-up of the sparsity).
    """
    starts = (0, *boundaries) if isinstance(boundaries, list | tuple) else ()
    whole = starts and all(isinstance(b, int) and not isinstance(b, bool) for b in starts)
    if not whole or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(
            f"scheduled: boundaries={boundaries!r} must be whole numbers that increase from "
            "1 (the first compressor is used from step 0)."
        )
    codecs = tuple(codec_of(c, f"compressors[{i}]") for i, c in enumerate(compressors))
    if len(codecs) != len(starts):
        raise ValueError(
            f"scheduled: compressors has {len(codecs)} entries, but {len(starts) - 1} boundaries "
            f"make {len(starts)} stages; give one compressor for each."
        )
    check.count("scheduled", "period", period, least=max(starts) + 1, optional=True)
    return Compressor(Scheduled(starts, codecs, period))
