"""GradiVeQ: gradients are sent by their principal components, which earlier gradients determine.

samples     x = mean x_i, sent dense ;  the samples of a slice are kept
then        mu = mean of the samples ;  U = their d leading principal directions
compressed  y_i = U^T (x_i - mu) ;  y = mean y_i ;  out = U y + mu
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.policy import Stage, Stages, StepPolicy
from ef_optax._core.requests import Mean
from ef_optax._core.timeline import Timeline
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.blocks import from_blocks, to_blocks
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._numeric.shapes import Shape, size_of
from ef_optax.compressors._ratio import resolve_k
from ef_optax.compressors.compressor import Compressor

DENSE, SAMPLING, COMPRESSED = range(3)


class GradiVeQState(NamedTuple):
    """State of :func:`gradiveq` for one leaf; () for a dense one. The same on all workers."""

    samples: Array  # (groups, samples, K): the mean gradients of the groups' first slices
    mean: Array  # (groups, K): mu
    basis: Array  # (groups, K, d): U


class Slices(NamedTuple):
    """How a leaf is cut into ``number`` slices of K values, in ``groups`` that share directions."""

    number: int
    size: int  # K
    dimension: int  # d
    groups: int
    reuse: int  # slices in a group


@dataclasses.dataclass(frozen=True)
class GradiVeQ(MessagelessCodec, StepPolicy):
    """Slices of K values as d coordinates about their mean; ``stage`` is what this step does."""

    ratio: float
    samples: int
    period: int
    slice_size: int | None
    reuse: int | None
    start_step: int
    stage: int = COMPRESSED

    why: ClassVar[str] = (
        "its directions come from the gradients before. Use it in error_feedback or "
        "compressed_mean."
    )

    @property
    def traits(self) -> Traits:
        # Not independent, because the directions come from all workers' gradients.
        return Traits(homogeneous=False, independent=False, stateful=True)

    # -- which step does what

    @property
    def stages(self) -> Stages:
        dense, sampling, compressed = (
            Stage(dataclasses.replace(self, stage=stage)) for stage in (DENSE, SAMPLING, COMPRESSED)
        )
        start = self.start_step
        changes = (start + self.samples, start + self.period)
        if not start:
            return Stages(Timeline(changes, start, self.period), (sampling, compressed))
        timeline = Timeline((start, *changes), start, self.period)
        return Stages(timeline, (dense, sampling, compressed))

    # -- the slices of a leaf

    def plan(self, shape: Shape) -> Slices | None:
        """The leaf's slices, or None for a leaf that is always averaged dense."""
        if isinstance(shape, int) or len(shape) < (3 if self.slice_size is None else 1):
            return None
        length = size_of(shape[-2:]) if self.slice_size is None else self.slice_size
        length = min(length, size_of(shape))
        if not size_of(shape):
            return None
        count = -(-size_of(shape) // length)
        dimension = min(self.samples, resolve_k(self.ratio, None, length))
        reuse = min(count, self.reuse or count)
        slices = Slices(count, length, dimension, -(-count // reuse), reuse)
        return slices if count * dimension + 1 < size_of(shape) else None

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        del path, num_workers
        plan = self.plan(like.shape)
        if plan is None:
            return ()
        dtype, lead = wide_dtype(like.dtype), plan.groups
        return GradiVeQState(
            samples=jnp.zeros((lead, self.samples, plan.size), dtype),
            mean=jnp.zeros((lead, plan.size), dtype),
            basis=jnp.zeros((lead, plan.size, plan.dimension), dtype),
        )

    # -- one exchange

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        plan = self.plan(x.shape)
        if plan is None or self.stage != COMPRESSED:
            mean = yield Mean(x)
            after = state
            if plan is not None and self.stage == SAMPLING:
                after = self._sampled(mean, state, plan, workers.step)
            return _outcome(x, mean, x, after)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        mu, U = state.mean[:, None], state.basis
        y_i = einsum("gsk,gkd->gsd", _grouped(x, plan) - mu, U)
        real = y_i.reshape(-1, plan.dimension)[: plan.number]
        # The second mean is 1, or the mean of the weights: the share of mu in the mean.
        received, share = yield Mean((real, jnp.ones((), real.dtype)))
        y = _padded(received, plan).reshape(y_i.shape)

        def value(coordinates: Array, shift: Array) -> Array:
            slices = einsum("gkd,gsd->gsk", U, coordinates) + shift
            return from_blocks(slices.reshape(-1, plan.size), like)

        return _outcome(x, value(y, share * mu), value(y_i, mu), state)

    def _sampled(self, mean: Array, state: GradiVeQState, plan: Slices, step: Array) -> Any:
        """The state with one more sample, and, after the last sample, with the new directions."""
        number = (step - self.start_step) % self.period
        first = _grouped(mean, plan)[:, 0]
        own = jnp.arange(self.samples)[:, None] == number
        samples = jnp.where(own, first[:, None], state.samples)

        def principal() -> tuple[Array, Array]:
            mu = jnp.mean(samples, axis=1)
            directions = jnp.linalg.svd(samples - mu[:, None], full_matrices=False)[2]
            return mu, jnp.swapaxes(directions[:, : plan.dimension], 1, 2)

        last = number == self.samples - 1
        return GradiVeQState(
            samples, *jax.lax.cond(last, principal, lambda: (state.mean, state.basis))
        )

    # -- size of the message

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        plan = self.plan(shape)
        if plan is None or self.stage != COMPRESSED:
            return size_of(shape) * bits_of(dtype)
        return (plan.number * plan.dimension + 1) * bits_of(wide_dtype(dtype))


def _grouped(x: Array, plan: Slices) -> Array:
    """The slices as (groups, slices in a group, K), with zeros after the last slice."""
    slices = to_blocks(x.astype(wide_dtype(x.dtype)), plan.size)
    return _padded(slices, plan).reshape(plan.groups, plan.reuse, plan.size)


def _padded(slices: Array, plan: Slices) -> Array:
    missing = plan.groups * plan.reuse - plan.number
    return jnp.pad(slices, ((0, missing), (0, 0))) if missing else slices


def _outcome(x: Array, aggregate: Array, sent: Array, state: Any) -> Outcome:
    return Outcome(
        aggregate=aggregate,
        state=state,
        sent=lambda: sent,
        residual=lambda: x - sent,
        support=lambda: jnp.ones(x.shape, bool),
    )


def gradiveq(
    ratio: float,
    *,
    samples: int = 100,
    period: int = 500,
    slice_size: int | None = None,
    reuse: int | None = None,
    start_step: int = 0,
) -> Compressor:
    """GradiVeQ: sends slices of the gradient by their principal components, summed on the way.

    The flattened leaf is cut into slices of K values. (For a convolution as Flax stores it, a slice
    has the values of all filters at one position, as published.) The first ``samples`` exchanges of
    every period are dense. The mean gradients g of a slice in these exchanges give ``mu = mean g``
    and U, the d = ceil(ratio K) leading eigenvectors of their covariance. In the other exchanges
    only d numbers per slice travel, by an all-reduce, because the map is affine::

        y_i = U^T (x_i - mu);   out = U mean(y_i) + mu

    What is outside of ``mu + span U`` is lost, unless error feedback keeps it (not part of the
    paper). A zero gradient gives ``mu - U U^T mu`` instead of zeros. There are no constants, since
    a gradient may be orthogonal to all samples.

    Args:
      ratio: d/K in (0, 1]; the paper observes 1/8. d is at most ``samples``. It is constant here,
        while the paper chooses it in each period by a share of the variance.
      samples: number of dense exchanges at the start of each period.
      period: length of a period, more than ``samples``.
      slice_size: K, or None for the inputs times the outputs of each convolution, the product of
        its last two axes; leaves with fewer than three axes are then dense, as published. A leaf
        with fewer values than K is one slice.
      reuse: number of consecutive slices that share the directions of their first slice, or None
        for all slices of a leaf, as in the paper's experiments.
      start_step: number of dense exchanges before the first period (2500 in the paper).

    Returns:
      The compressor. Bits of a compressed exchange: 32 (slices d + 1), where the last word is the
      mean of the workers' weights; ``codec.at(step).bits`` are those of any step. The memory for
      each leaf and group is K (samples + d + 1) float32 numbers.

    Raises:
      ValueError: for an argument out of range.

    Example:
      >>> import ef_optax as ef
      >>> codec = ef.gradiveq(1 / 8, samples=10, period=50).codec
      >>> [codec.at(step).bits((3, 3, 16, 16)) for step in (9, 10, 49, 50)]
      [73728, 2912, 2912, 73728]

    References:
      Yu et al., GradiVeQ: Vector quantization for bandwidth-efficient gradient aggregation in
      distributed CNN training, NeurIPS 2018, sections 2-3, equations 3-6.
    """
    check.ratio("gradiveq", "ratio", ratio)
    check.count("gradiveq", "samples", samples)
    check.count("gradiveq", "period", period)
    for name, value in (("slice_size", slice_size), ("reuse", reuse)):
        check.count("gradiveq", name, value, optional=True)
    if period <= samples:
        raise ValueError(
            f"gradiveq: period={period!r} must be longer than its samples={samples!r} dense steps."
        )
    check.count("gradiveq", "start_step", start_step, least=0)
    return Compressor(GradiVeQ(ratio, samples, period, slice_size, reuse, start_step))
