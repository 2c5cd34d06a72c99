"""The codec: one compression operator for one leaf.

A **codec** is a frozen dataclass that knows one compression operator ``C`` for one array: how a
message is made (``encode``) and decoded (``decode``), how many bits travel (``bits``), and which
constants and properties hold (``alpha``, ``omega``, ``traits``). Its fields are the
hyper-parameters, which are static Python values; everything that changes from step to step is an
array.

A codec never calls a collective. Its ``protocol`` is a Python generator that runs at trace time and
*yields requests* (:class:`Gather`, :class:`Mean`, :class:`Sum`, :class:`Max`, :class:`AllToAll`,
:class:`Permute`); the driver in ``_exchange`` advances the protocols of all leaves together and
turns each round into one transfer. The default protocol is that of the codec's ``transport``, by
default one ``Gather`` of the encoded message.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from ef_optax._core.outcome import Protocol
from ef_optax._core.requests import Message
from ef_optax._core.traits import NAMES, Basis, Granularity, Traits
from ef_optax._core.transport import AllGather, Transport
from ef_optax._core.workers import Workers
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.finite import all_finite
from ef_optax._numeric.reductions import UNROLL_LIMIT
from ef_optax._numeric.shapes import Shape, like_of


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """One compression operator for one leaf. Subclasses are frozen dataclasses and final.

    A codec is three functions: :meth:`encode`, :meth:`decode`, :meth:`bits`. Its property
    :attr:`traits` declares the properties on which others may rely. Everything below has a default.
    """

    # -- the operator

    @abc.abstractmethod
    def encode(self, x: Array, key: Array | None = None) -> Message:
        """Makes the message of ``x``, which may have any shape; scalars and empty arrays too."""

    @abc.abstractmethod
    def decode(self, message: Message, like: jax.ShapeDtypeStruct) -> Array:
        """What the receiver decodes; ``like`` has the shape and dtype, not the local array."""

    @abc.abstractmethod
    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Exact number of bits in one worker's message, before padding to a 32-bit word."""

    # -- what follows from the operator; subclasses override what they can compute faster

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
          total: the divisor; by default n.
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
        """``x - decode(message)``; overridden if it can be had in place or without decoding."""
        return x - self.decode(message, like_of(x))

    def support(self, x: Array, message: Message) -> Array:
        """Mask of the coordinates that the message carries; all coordinates, unless overridden."""
        del message
        return jnp.ones(x.shape, bool)

    def finite(self, x: Any, message: Message) -> Array:
        """Whether ``x`` and what is decoded are finite, as a boolean scalar for the header.

        Codecs override it if the message alone shows it, so that ``x`` need not be read again. It
        must be False if ``x`` has a NaN or an infinity, and may be False if the message overflowed.
        """
        del message
        return all_finite(jax.tree.leaves(x), local=True)

    # -- properties and constants

    most_values: ClassVar[float] = 2**31 - 1
    """The most values of a leaf (of a group, for a codec of groups) that the codec takes.

    Positions are numbers of 32 bits. Codecs without positions set it to ``math.inf``.
    """

    @property
    def separable_into(self) -> int | None:
        """The length of blocks of which each is compressed by itself; None if there are none.

        If the sizes of several leaves are multiples of it, the codec does the same to one vector of
        all of them as to each, in as many bits; random numbers must come from ``random_words``. The
        exchange then makes one program for all of these leaves, at the price of a copy. So it is
        declared only by codecs that take several times as long as a copy.
        """
        return None

    @property
    def ignores_zeros(self) -> bool:
        """Whether zeros behind the values of a leaf leave the message of these values as it is.

        It is declared beside ``separable_into``. Each field of the message must have an entry for
        each block, or a code of equal width for each value. The exchange can then join leaves that
        end within a block, with zeros between them, of which nothing is sent.
        """
        return False

    @property
    def traits(self) -> Traits:
        """The properties on which others may rely, as ``Traits(unbiased=True, ...)``."""
        return Traits()

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        """Bits that one worker contributes in each round of its protocol."""
        return self.transport.traffic(self, shape, dtype, num_workers)

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Contraction: ``E||C(x) - x||^2 <= (1 - alpha)||x||^2``; None if no bound is known."""
        del shape, num_workers
        return None

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        """Variance if unbiased: ``E||C(x) - x||^2 <= omega ||x||^2``; None if unknown."""
        del shape, num_workers
        return None

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        """``E||C(x) - x||^2 / ||x||^2`` for noise; 0 if it is unknown or certainly below 1.

        Noise is an x whose values (for a low-rank codec, singular values) are of about equal size;
        a residual becomes such an x. If the error is 1 or more, the residual grows at every step.
        ``omega`` does not show this, because it describes the worst x.
        """
        del shape, num_workers
        return 0.0

    # -- state and protocol

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        """The codec's state for one leaf; a codec of groups has one for each leaf.

        Args:
          like: shape and dtype of the leaf, or of the slice of it that one device owns.
          path: the name of the leaf.
          num_workers: the number of workers in the exchange; 1 if the state is made outside of the
            map over the workers.
        """
        del like, path, num_workers
        return ()

    def init_each(self, likes: Sequence[Any], paths: Sequence[str], num_workers: int) -> list[Any]:
        """:meth:`init` of several leaves; overridden if it compiles faster together."""
        each = zip(likes, paths, strict=True)
        return [self.init(like, path, num_workers) for like, path in each]

    def step_key(self, workers: Workers) -> Array | None:
        """This step's key for this leaf and worker; None for a deterministic codec."""
        if self.deterministic:
            return None
        key: Array = getattr(self, "key")  # noqa: B009  (declared by randomised subclasses)
        return workers.fold(key)

    @property
    def transport(self) -> Transport:
        """How the message travels, unless a transport is put around the codec."""
        return AllGather()

    def protocol(self, x: Any, state: Any, workers: Workers) -> Protocol:
        """One exchange of one leaf: yields requests, receives answers, returns an outcome."""
        return self.transport.run(self, x, state, workers)

    @property
    @final
    def self_contained(self) -> bool:
        """Whether :meth:`encode` alone makes the message of a worker's leaf.

        Such a codec can be part of another one, and any transport may carry it. A codec with its
        own protocol, with state, or for groups of leaves is not self-contained.
        """
        own_protocol = type(self).protocol is not Codec.protocol
        return not (own_protocol or self.stateful or self.granularity != "leaf")

    @property
    def name(self) -> str:
        """The name of the codec in error messages."""
        return type(self).__name__

    # -- the declared traits, one by one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses traits that are declared outside of ``traits``, where nothing reads them."""
        super().__init_subclass__(**kwargs)
        if misplaced := sorted(NAMES & vars(cls).keys()):
            raise TypeError(
                f"{cls.__name__} defines {', '.join(misplaced)}; declare it in the property "
                f"traits instead: return Traits({misplaced[0]}=...)."
            )

    @property
    @final
    def unbiased(self) -> bool:
        return self.traits.unbiased

    @property
    @final
    def linear(self) -> bool:
        return self.traits.linear

    @property
    @final
    def homogeneous(self) -> bool:
        return self.traits.homogeneous

    @property
    @final
    def deterministic(self) -> bool:
        return self.traits.deterministic

    @property
    @final
    def additive(self) -> bool:
        return self.traits.additive

    @property
    @final
    def independent(self) -> bool:
        return self.traits.independent

    @property
    @final
    def broadcast(self) -> bool:
        return self.traits.broadcast

    @property
    @final
    def streams(self) -> bool:
        return self.traits.streams

    @property
    @final
    def stateful(self) -> bool:
        return self.traits.stateful

    @property
    @final
    def granularity(self) -> Granularity:
        return self.traits.granularity

    @property
    @final
    def basis(self) -> Basis:
        return self.traits.basis
