"""What a compressor is: the codec of one leaf, what it asks of the workers, what it answers.

A **codec** is a frozen dataclass that knows one compression operator ``C`` for one array: how a
message is made (``encode``), what the receiver sees (``decode``), how many bits travel (``bits``),
and which theory holds (``alpha``, ``omega``, the declared properties). Hyper-parameters are its
fields and are static Python values; everything that changes from step to step is an array.

A codec never calls a collective. Its ``protocol`` is a Python generator that runs at trace time and
*yields requests* (:class:`Gather`, :class:`Mean`, :class:`Sum`, :class:`Max`, :class:`AllToAll`,
:class:`Permute`); the driver in ``_exchange`` advances the protocols of all leaves together and
turns each round into one transfer. The default protocol is one ``Gather`` of the encoded message.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ef_optax._core.outcome import Outcome, Protocol
from ef_optax._core.requests import Gather, Gathered, Message
from ef_optax._core.timeline import Timeline
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite
from ef_optax._numeric.reductions import UNROLL_LIMIT
from ef_optax._numeric.shapes import Shape, like_of


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """One compression operator for one leaf. Subclasses are frozen dataclasses and final.

    Class attributes (or properties, where they depend on the fields) declare what may be relied
    on; tests hold each one, and hold a counterexample to each that is declared false:

      unbiased: ``E C(x) = x``.
      linear: ``C(a x + b y) = a C(x) + b C(y)`` for the same randomness.
      homogeneous: ``C(a x) = a C(x)`` for every a > 0 (powers of two, up to rounding).
      deterministic: no randomness; otherwise the codec has a field ``key``.
      additive: the aggregate is the weighted mean of what the workers sent.
      independent: what is sent of x depends on this worker's x alone (and on randomness).
      streams: the residual is one pass over x and the message, so it is cheaper to form x anew for
        it (the sum of gradient and memory) than to write x down when the message is made.
      stateful: the codec carries state from step to step (``init``).
      granularity: ``"leaf"``, ``"group"`` for a codec that receives the list of its leaves, or
        ``"schedule"`` for one that changes with the step and is not run itself.
      transports: the ways its messages can travel: ``"gather"``, ``"reduce"`` (all-reduce), or the
        name of an exchange of its own that only makes sense between several workers.
      timeline: the steps at which the codec changes, if it does (see :meth:`at`).
      basis: what ``alpha`` and ``omega`` are worth: ``"exact"`` (some input attains them),
        ``"bound"`` (proved, perhaps not attained), ``"asymptotic"`` (there is a limit for long
        vectors, given in the documentation, and no constant), or ``"none"``.
    """

    unbiased: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    granularity: ClassVar[str] = "leaf"
    transports: ClassVar[tuple[str, ...]] = ("gather",)
    timeline: ClassVar[Timeline] = Timeline()
    basis: ClassVar[str] = "none"

    # -- the operator

    @abc.abstractmethod
    def encode(self, x: Array, key: Array | None = None) -> Message:
        """Makes the message of ``x`` (any shape, also scalars and empty arrays)."""

    @abc.abstractmethod
    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        """What the receiver sees; ``like`` gives shape and dtype (never the local array)."""

    def decode_mean(
        self,
        messages: Message,
        like: jax.ShapeDtypeStruct,
        weights: Array | None = None,
        total: Array | int | None = None,
    ) -> Array:
        """``(1/total) sum_i weights_i decode(messages_i)`` without holding n dense vectors.

        Args:
          messages: the message's tree with a leading worker axis n.
          like: shape and dtype of the result.
          weights: (n,) weights, or None for all ones.
          total: the divisor; default n.
        """
        n = jax.tree.leaves(messages)[0].shape[0]

        def term(i: Any) -> Array:
            part = self.decode(jax.tree.map(lambda m: m[i], messages), like)
            return part if weights is None else part * weights[i].astype(part.dtype)

        if n <= UNROLL_LIMIT:
            result = term(0)
            for i in range(1, n):
                result = result + term(i)
        else:
            result = jax.lax.fori_loop(1, n, lambda i, acc: acc + term(i), term(0))
        return result / jnp.asarray(n if total is None else total, like.dtype)

    def residual(self, x: Array, message: Message) -> Array:
        """``x - decode(message)``; overridden where it can be had in place or without decoding."""
        return x - self.decode(message, like_of(x))

    def support(self, x: Array, message: Message) -> Array:
        """Mask of the coordinates that the message carries; all of them unless overridden."""
        del message
        return jnp.ones(x.shape, bool)

    def finite(self, x: Any, message: Message) -> Array:
        """Whether ``x`` and what is decoded are finite: a boolean scalar, part of the header.

        Overridden where the message tells, so that ``x`` is not read once more. It must be False
        for a NaN or an infinity anywhere in ``x``, and may be for a message that has overflowed.
        """
        del message
        return all_finite(jax.tree.leaves(x), local=True)

    # -- several large leaves

    def family(self, like: jax.ShapeDtypeStruct) -> Hashable | None:
        """Equal for large leaves that the codec of :meth:`joint` takes together; None for none."""
        del like
        return None

    def joint(self) -> Codec:
        """The codec of a list of leaves of one family: each gets what it would get alone.

        Its granularity is ``"group"``. Equal small leaves are stacked; this is for leaves that are
        too large to be copied.
        """
        raise NotImplementedError(f"{type(self).__name__} names families but has no joint codec")

    # -- what is known about it

    @abc.abstractmethod
    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Exact number of bits in one worker's message, before padding to a 32-bit word."""

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits that one worker contributes in each round of its protocol."""
        del num_workers
        return (self.bits(shape, dtype),)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Contraction: ``E||C(x) - x||^2 <= (1 - alpha)||x||^2``; None where no bound is known."""
        del shape, num_workers
        return None

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Variance if unbiased: ``E||C(x) - x||^2 <= omega ||x||^2``; None if not known."""
        del shape, num_workers
        return None

    def least_error(self, shape: Shape, num_workers: int = 1) -> float:
        """``E||C(x) - x||^2 >= least_error ||x||^2`` for *every* x; 0 where none is known.

        From 1 on a memory of what was not sent grows at every step, whatever the gradients are;
        ``omega`` does not tell, which is about the worst x.
        """
        del shape, num_workers
        return 0.0

    # -- state and protocol

    def init(self, like: Any, path: str) -> Any:
        """The codec's state for one leaf (for its list of leaves with ``granularity="group"``)."""
        del like, path
        return ()

    def for_leaf(self, path: str, like: jax.ShapeDtypeStruct) -> Codec:
        """The codec that is used for this leaf; only :func:`ef_optax.per_leaf` chooses."""
        del path, like
        return self

    def at(self, step: int) -> Codec:
        """The codec that is used in exchange number ``step``: the same all through a phase."""
        del step
        return self

    def phase(self, step: int) -> Hashable:
        """What tells the phases of the timeline apart; equal phases share one compiled branch."""
        del step
        return 0

    def state_at(self, state: Any, step: int) -> Any:
        """The part of a leaf's state that belongs to the codec of this step."""
        del step
        return state

    def state_after(self, state: Any, new: Any, step: int) -> Any:
        """The leaf's state with the part of this step's codec replaced."""
        del state, step
        return new

    def step_key(self, workers: Workers) -> Array | None:
        """This step's key for this leaf and worker; None for a deterministic codec."""
        if self.deterministic:
            return None
        key: Array = getattr(self, "key")  # noqa: B009  (declared by randomised subclasses)
        return workers.fold(key)

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        """One exchange of one leaf: yields requests, receives answers, returns an outcome."""
        message = self.encode(x, self.step_key(workers))
        like = like_of(x)
        gathered: Gathered = yield Gather(message, self.finite(x, message))
        return Outcome(
            aggregate=self.decode_mean(gathered.messages, like, gathered.weights, gathered.total),
            state=state,
            sent=lambda: self.decode(message, like),
            residual=lambda x=x: self.residual(x, message),
            support=lambda: self.support(x, message),
        )


def joint_basis(*codecs: Codec) -> str:
    """What the constants of a codec made of others are worth: a bound, if those of all are known.

    >>> joint_basis()
    'bound'
    """
    return "bound" if all(codec.basis in ("exact", "bound") for codec in codecs) else "none"
