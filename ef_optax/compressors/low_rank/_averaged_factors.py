"""What the low-rank methods with averaged factors share: matrices of one shape form one batch.

The codec gets all leaves of an exchange together (``granularity="group"``). Matrices of one shape
form a batch, with one orthonormalisation and one array on the wire instead of one per layer.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Mean
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array, bits_of, wide_dtype
from ef_optax._numeric.matrix import Matrices, matrix_view
from ef_optax._numeric.random import as_key
from ef_optax._numeric.shapes import Shape, bits_for, size_of
from ef_optax.compressors._batches import Batch, batches_of
from ef_optax.compressors.combine.scheduled import delayed
from ef_optax.compressors.compressor import Compressor


@dataclasses.dataclass(frozen=True)
class Averaged:
    """The result of a method, with an entry for each batch.

    Attributes:
      after: the next states of the batch's members.
      out: the factors that all workers apply.
      own: the factors of this worker's part.
    """

    after: Sequence[Sequence[Any]]
    out: Sequence[tuple[Array, Array]]
    own: Sequence[tuple[Array, Array]]


Steps = Generator[list[Array], list[Array], Averaged]
"""The steps of a method: it yields a factor of each batch and receives their means."""


Factor = tuple[int, ...]
"""The shape of a factor."""


@dataclasses.dataclass(frozen=True)
class AveragedFactors(MessagelessCodec):
    """A low-rank approximation of the mean, whose factors are averaged one after the other."""

    rank: int
    key: Array | int
    min_compression: float = 1.0
    iterations: int = 1
    local_error: bool = False
    batch_axes: int = 0

    why: ClassVar[str] = (
        "its factors are averaged one after the other. Use it in error_feedback or "
        "compressed_mean, or take ef_optax.svd for a message of one worker."
    )
    most_values: ClassVar[float] = math.inf

    @property
    def traits(self) -> Traits:
        return Traits(independent=False, stateful=True, granularity="group")

    @abc.abstractmethod
    def factors(self, batches: Sequence[Batch], state: Sequence[Any]) -> Steps:
        """The steps of the method, for the leaves that are compressed."""

    @abc.abstractmethod
    def elements(self, matrices: Matrices, rank: int) -> float:
        """Number of elements that travel for one matrix in a step, on average."""

    @abc.abstractmethod
    def rounds(self, left: int, right: int) -> tuple[int, ...]:
        """Bits of each round of a step, from the bits of the two factors."""

    def plan(self, shape: Shape) -> tuple[Matrices, int] | None:
        """The leaf's matrices and the rank of their factors, or None for a dense leaf."""
        matrices = matrix_view(shape, self.batch_axes)
        if matrices is None:
            return None
        rank = min(self.rank, matrices.rows, matrices.columns)
        size = matrices.rows * matrices.columns
        saves = size > self.min_compression * self.elements(matrices, rank)
        return (matrices, rank) if saves else None

    @abc.abstractmethod
    def begin(self, matrices: Matrices, rank: int) -> dict[str, Factor]:
        """The factors in the state of a leaf: endings of their names, and their shapes."""

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        return self.init_each([like], [path], num_workers)[0]

    def init_each(self, likes: Sequence[Any], paths: Sequence[str], num_workers: int) -> list[Any]:
        """The factors of each leaf, or ``()`` for a dense one.

        They are standard normal, and the same on all workers. All of a size class are drawn
        together, because a generator takes long to compile; each is the beginning of what is drawn.
        """
        del num_workers
        names: dict[tuple[int, Any], list[str]] = {}  # by size class and dtype
        owners: list[list[tuple[tuple[int, Any], int, Factor]]] = []
        for like, path in zip(likes, paths, strict=True):
            owners.append([])
            plan = self.plan(like.shape)
            for ending, shape in self.begin(*plan).items() if plan else ():
                kind = 1 << bits_for(math.prod(shape)), wide_dtype(like.dtype)
                of_kind = names.setdefault(kind, [])
                owners[-1].append((kind, len(of_kind), shape))
                of_kind.append(path + ending)
        drawn = {kind: self._normal(of_kind, *kind) for kind, of_kind in names.items()}
        factors = [
            [drawn[kind][number, : math.prod(shape)].reshape(shape) for kind, number, shape in own]
            for own in owners
        ]
        return [self.state_of(*own) if own else () for own in factors]

    def state_of(self, *factors: Array) -> Any:
        """The state of a leaf, from its factors in the order of :meth:`begin`."""
        (only,) = factors
        return only

    def _normal(self, names: Sequence[str], size: int, dtype: Any) -> Array:
        hashes = np.asarray([zlib.crc32(name.encode()) for name in names], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(as_key(self.key, "low rank"), hashes)
        return jax.vmap(lambda key: jax.random.normal(key, (size,), dtype))(keys)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        """The method's steps; the first round averages the dense leaves as well."""
        plans = [self.plan(leaf.shape) for leaf in x]
        batches, dense = batches_of(x, plans, workers.step)
        means, waiting = [], [x[i] for i in dense]
        steps = self.factors(batches, state)
        factors = next(steps)
        while True:
            averaged, received = yield Mean((factors, waiting))
            means, waiting = [*means, *received], []
            try:
                factors = steps.send(averaged)
            except StopIteration as stop:
                dense_means = dict(zip(dense, means, strict=True))
                return self._outcome(x, state, batches, stop.value, dense_means)

    def _outcome(
        self,
        x: Sequence[Array],
        state: Sequence[Any],
        batches: Sequence[Batch],
        result: Averaged,
        dense: dict[int, Array],
    ) -> Outcome:
        """The outcome for all leaves; ``dense`` has the means of the uncompressed ones."""

        def filled(factors: Sequence[tuple[Array, Array]], rest: Callable[[int], Array]) -> Any:
            """Products for the compressed leaves, ``rest`` for the others."""
            values = {i: rest(i) for i in dense}
            for batch, (left, right) in zip(batches, factors, strict=True):
                for i, value in zip(batch.members, batch.values(left, right), strict=True):
                    values[i] = value.astype(x[i].dtype).reshape(x[i].shape)
            return [values[i] for i in range(len(x))]

        def sent() -> list[Array]:
            return filled(result.own if self.local_error else result.out, lambda i: x[i])

        states = list(state)
        for batch, new in zip(batches, result.after, strict=True):
            for i, value in zip(batch.members, new, strict=True):
                states[i] = value
        return Outcome(
            aggregate=filled(result.out, lambda i: dense[i]),
            state=states,
            sent=sent,
            residual=lambda: [a - b for a, b in zip(x, sent(), strict=True)],
            support=lambda: [jnp.ones(a.shape, bool) for a in x],
        )

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        del num_workers
        plan = self.plan(shape)
        if plan is None:
            return (size_of(shape) * bits_of(dtype),)
        matrices, rank = plan
        wide = bits_of(wide_dtype(dtype)) * rank * matrices.number
        return self.rounds(matrices.rows * wide, matrices.columns * wide)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        return sum(self.traffic(shape, dtype, 1))


def unless_zero(new: Array, old: Array) -> Array:
    """``new``, but ``old`` for each matrix whose new factor is zero.

    After a step with zero gradients, the last directions are better than none.
    """
    return jnp.where(jnp.any(new != 0, axis=(-2, -1), keepdims=True), new, old)


def averaged_factors(
    name: str,
    kind: type[AveragedFactors],
    rank: int,
    *,
    key: Any,
    start_step: int,
    min_compression: float,
    iterations: int,
    local_error: bool,
    batch_axes: int,
) -> Compressor:
    """The compressor of a method of averaged factors, from its options."""
    check.count(name, "rank", rank)
    check.count(name, "start_step", start_step, least=0)
    check.static(name, "min_compression", min_compression, lambda x: x >= 1, "at least 1")
    check.count(name, "iterations", iterations)
    check.flag(name, "local_error", local_error)
    check.count(name, "batch_axes", batch_axes, least=0)
    typed = as_key(key, name)
    codec = kind(
        rank,
        key if isinstance(key, int) else typed,  # an int, unlike an array, is compared by value
        float(min_compression),
        iterations,
        local_error,
        batch_axes,
    )
    return delayed(start_step, codec)
