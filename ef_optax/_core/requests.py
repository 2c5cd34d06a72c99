"""The requests of a protocol to the workers, and their answers: plain data, no collectives."""

from __future__ import annotations

import dataclasses
from typing import Any

from ef_optax._numeric.dtypes import Array

Message = Any
"""A pytree of fields: arrays of exactly the dtypes that travel (narrow values, scales), and bits
packed by :func:`ef_optax.extend.pack`."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Asks for the messages of all workers; the answer is a :class:`Gathered`.

    Attributes:
      message: what this worker sends.
      finite: whether this leaf was finite, or None if the driver must read the leaf to know.
      early: whether the message was made in an earlier step. It then travels by itself, without the
        header, so that its transfer waits for nothing of this step; it carries no weight.
    """

    message: Message
    finite: Array | None = None
    early: bool = False


@dataclasses.dataclass(frozen=True)
class Mean:
    """Asks for the weighted mean of a tree of floating arrays over the workers."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Sum:
    """Asks for the plain sum of a tree of arrays over the workers; integers must not overflow."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Max:
    """Asks for the elementwise maximum of a tree of arrays over the workers.

    The hardware's maximum may drop a NaN; map non-finite values to ``+inf`` first.
    """

    value: Any


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Sends row ``j`` of every array to worker ``j``.

    The answer is a :class:`Gathered` with the rows that all workers sent to this one.
    """

    message: Message


@dataclasses.dataclass(frozen=True)
class Permute:
    """Sends a message from worker ``source`` to worker ``target`` for each (source, target).

    The answer is the received message; workers that are not a target receive zeros.
    """

    message: Message
    pairs: tuple[tuple[int, int], ...]  # each worker at most once as source and once as target


Request = Gather | Mean | Sum | Max | AllToAll | Permute


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every worker's message, or its row for this worker, with the weights and the divisor.

    It is the answer to :class:`Gather` and to :class:`AllToAll`.
    """

    messages: Message  # the message's tree, each array with a leading worker axis (n, ...)
    weights: Array | None  # (n,) float32, or None if every worker has weight 1
    total: Array | int  # the divisor of the mean: n, or the sum of the weights
    ok: Array | None = None  # whether all messages are good; None if no header came with them
