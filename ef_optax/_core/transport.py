"""How messages travel: a transport runs the exchange of any codec whose message it can carry.

Every codec travels by its own ``transport`` unless another one is put around it
(``ef_optax.exchanges``). The two transports that need nothing but a message are here; each of the
others has its own file in ``exchanges/``.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ef_optax._core.once import traced_once
from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Mean
from ef_optax._core.traits import Traits
from ef_optax._core.workers import Workers
from ef_optax._numeric.buffers import in_buffers
from ef_optax._numeric.dtypes import Array, bits_of
from ef_optax._numeric.shapes import Shape, like_of, size_of

if TYPE_CHECKING:
    from ef_optax._core.codec import Codec
    from ef_optax._core.need import Need


@dataclasses.dataclass(frozen=True)
class Transport(abc.ABC):
    """A way in which messages travel. Subclasses are frozen dataclasses and final.

    A transport is one function, :meth:`run`. It carries self-contained codecs, whose ``encode``
    alone makes a message; :attr:`needs` has what else it requires of them. Everything below has a
    default, which is that of a single round of messages whose mean is the aggregate.
    """

    @abc.abstractmethod
    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        """One exchange of one leaf: yields requests, receives answers, returns an outcome."""

    # -- properties and constants

    @property
    def needs(self) -> tuple[Need, ...]:
        """What a codec must have to travel this way, besides being self-contained."""
        return ()

    @property
    def stacks(self) -> bool:
        """Whether equal leaves may be stacked and travel as one, with the same result."""
        return False

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits that one worker contributes in each round."""
        del num_workers
        return (codec.bits(shape, dtype),)

    def traits(self, codec: Codec) -> Traits:
        """The properties of this codec on this transport, on which others may rely."""
        return codec.traits

    def alpha(self, codec: Codec, shape: Shape, num_workers: int) -> float | None:
        """The contraction of what a worker has *sent*; None if no bound is known."""
        return codec.alpha(shape, num_workers)

    def noise_error(self, codec: Codec, shape: Shape, num_workers: int) -> float:
        """The error on noise of what a worker has sent; see :meth:`Codec.noise_error`."""
        return codec.noise_error(shape, num_workers)

    # -- state, for a transport whose traits are stateful

    def init(self, codec: Codec, like: Any, num_workers: int) -> Any:
        """The transport's state for one leaf."""
        del codec, like, num_workers
        return ()


def mean_of(codec: Codec, got: Gathered, like: Any, workers: Workers) -> Array:
    """The weighted mean of the messages that a worker has received, decoded once.

    Reading the mean of one message again takes as long as decoding it again.
    """

    def mean() -> Array:
        return traced_once(codec.decode_mean, got.messages, like, got.weights, got.total)

    if workers.size == 1:
        return mean()
    # The header is read before the mean is made. Else all messages are kept until the end of the
    # step, where the verdict is needed: four bytes a value for eight workers and four bits.
    runtime = workers.step if got.ok is None else got.ok.astype(jnp.int32)
    return in_buffers(mean, runtime)


@dataclasses.dataclass(frozen=True)
class AllGather(Transport):
    """Every worker receives the messages of all workers, decodes them and averages the results."""

    @property
    def stacks(self) -> bool:
        return True

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        message, like = traced_once(codec.encode, x, codec.step_key(workers)), like_of(x)
        got: Gathered = yield Gather(message, traced_once(codec.finite, x, message))
        return Outcome(
            aggregate=mean_of(codec, got, like, workers),
            state=state,
            sent=lambda: traced_once(codec.decode, message, like),
            residual=lambda x=x: traced_once(codec.residual, x, message),
            support=lambda: traced_once(codec.support, x, message),
        )


@dataclasses.dataclass(frozen=True)
class AllReduce(Transport):
    """Every worker decodes its own message; the dense arrays are averaged on the way."""

    def run(self, codec: Codec, x: Array, state: Any, workers: Workers) -> Protocol:
        message = traced_once(codec.encode, x, codec.step_key(workers))
        sent = traced_once(codec.decode, message, like_of(x))
        mean = yield Mean(sent)
        return Outcome(
            aggregate=mean,
            state=state,
            sent=lambda: sent,
            residual=lambda x=x: traced_once(codec.residual, x, message),
            support=lambda: traced_once(codec.support, x, message),
        )

    def traffic(self, codec: Codec, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """All values of the leaf, whatever the message is."""
        del codec, num_workers
        return (size_of(shape) * bits_of(dtype),)
