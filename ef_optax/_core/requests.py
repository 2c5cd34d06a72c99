"""What a protocol asks of the workers, and what it is answered: plain data, no collective."""

from __future__ import annotations

import dataclasses
from typing import Any

from ef_optax._numeric.dtypes import Array

Message = Any
"""A pytree of fields: arrays of exactly the dtypes that travel (narrow values, scales), and bits
packed by :func:`ef_optax.extend.pack`."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Asks for the messages of all workers; answered by :class:`Gathered`.

    ``finite`` says whether this leaf was finite, where the codec knows; the driver looks if None.
    """

    message: Message
    finite: Array | None = None


@dataclasses.dataclass(frozen=True)
class Mean:
    """Asks for the weighted mean of a tree of floating arrays over the workers."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Sum:
    """Asks for the plain sum of a tree of arrays over the workers (integers must have room)."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Max:
    """Asks for the elementwise maximum of a tree of arrays over the workers.

    A NaN may be dropped by the hardware's maximum; map non-finite values to ``+inf`` first.
    """

    value: Any


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Sends row ``j`` of every array to worker ``j``; answered by the rows that came to this one.

    The answer is a :class:`Gathered`, as that of :class:`Gather`.
    """

    message: Message


@dataclasses.dataclass(frozen=True)
class Permute:
    """Sends a message from worker ``source`` to worker ``target`` for each (source, target).

    Answered by the message received; workers that are no target receive zeros.
    """

    message: Message
    pairs: tuple[tuple[int, int], ...]  # each worker at most once as source, once as target


Request = Gather | Mean | Sum | Max | AllToAll | Permute


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every worker's message (or row for this one), its weight, and what to divide by.

    The answer to :class:`Gather` and to :class:`AllToAll`.
    """

    messages: Message  # the message's tree, each array with a leading worker axis (n, ...)
    weights: Array | None  # (n,) float32, or None when every worker counts fully
    total: Array | int  # the divisor of the mean: n, or the sum of the weights
