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
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._random import mix32
from ef_optax._reductions import by_block
from ef_optax._timeline import Timeline

Message = Any
"""A pytree of fields: arrays of exactly the dtypes that travel (narrow values, scales), and bits
packed by :func:`ef_optax.pack`."""

Shape = int | Sequence[int]
"""The shape of a leaf; an integer counts as a one-dimensional shape."""

Array = jax.Array
FLOATING_ONLY = (
    "but only floating-point leaves can be exchanged; keep the others out of params "
    "(take gradients and optimise the floating-point part of the model only)."
)
"""The end of the message that refuses other leaves, which have no gradient to compress."""
_GOLDEN = 0x9E3779B9  # sets worker i apart from slice i
UNROLL_LIMIT = 16
"""Up to this many workers ``decode_mean`` is an unrolled sum, beyond it a loop (compile time)."""


# ---------------------------------------------------------------------------- requests


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


# ---------------------------------------------------------------------------- the workers


@dataclasses.dataclass(frozen=True)
class Workers:
    """What a protocol may know about the workers without any communication.

    Attributes:
      size: number of workers n, a Python int (1 without an axis).
      index: this worker's index in 0..n-1 (an array; 0 without an axis).
      step: number of exchanges made so far (int32 array).
      path: a 32-bit hash of the leaf's path (of each leaf's, for leaves that are stacked).
      slice_index: index of the slice of a model-parallel leaf that this device owns, else 0.
    """

    size: int
    index: Array | int
    step: Array
    path: Any = 0
    slice_index: Array | int = 0

    def fold(self, key: Array, *, shared: bool = False) -> Array:
        """Derives this step's key from the codec's own key.

        The step, the leaf's path and its slice are folded in, and the worker's index unless
        ``shared``, in which case every worker draws the same numbers.
        """
        own_slice = mix32(jnp.asarray(self.slice_index, jnp.uint32))
        place = jnp.asarray(self.path, jnp.uint32) ^ own_slice
        if not shared:  # one word for all three: every fold_in is a long program to compile
            place = place ^ mix32(jnp.asarray(self.index, jnp.uint32) + jnp.uint32(_GOLDEN))
        return jax.random.fold_in(jax.random.fold_in(key, self.step), place)


# ---------------------------------------------------------------------------- the outcome


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a protocol returns. The last three are functions: what nobody asks for costs nothing.

    Attributes:
      aggregate: what every worker applies; for an additive codec the weighted mean of ``sent``.
      state: the codec's next state (``()`` when it has none).
      sent: gives what the receivers decode from this worker's message, never weighted.
      residual: gives ``x - sent()``; for a codec that streams also of a copy of x, if given one.
      support: gives the boolean mask of the coordinates that were sent.
    """

    aggregate: Any
    state: Any
    sent: Callable[[], Any]
    residual: Callable[..., Any]
    support: Callable[[], Any]


Protocol = Generator[Request, Any, Outcome]


# ---------------------------------------------------------------------------- the codec


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


# ---------------------------------------------------------------------------- small helpers


def all_finite(leaves: Sequence[Array], *, local: bool = False) -> Array:
    """Whether every number is finite, a boolean scalar.

    Args:
      leaves: arrays; those that are not floating-point are.
      local: whether each lies on one device as a whole. It may then be read as a vector, which on a
        CPU takes a sixth of the time; a split one would be gathered for that.

    >>> bool(all_finite([jnp.ones(2), jnp.zeros(0)])), bool(all_finite([jnp.array([1, jnp.inf])]))
    (True, False)
    """
    floats = [x for x in leaves if x.size and jnp.issubdtype(x.dtype, jnp.floating)]
    largest = _largest_of_local if local else _largest_magnitude
    verdicts = [largest(x) < _magnitude(jnp.inf, x.dtype) for x in floats]
    return all_of(verdicts)


def all_of(verdicts: Sequence[Array]) -> Array:
    """Whether all of several boolean scalars are true.

    >>> bool(all_of([jnp.array(True), jnp.array(False)])), bool(all_of([]))
    (False, True)
    """
    if len(verdicts) < 2:
        return verdicts[0] if verdicts else jnp.ones((), bool)
    # The least by a sort: a reduction is fused into each kernel that chooses by it, and with a
    # kernel for each leaf that took seven seconds to compile where this takes none (200 leaves).
    return jax.lax.sort(jnp.stack(verdicts).astype(jnp.int32))[0] > 0


def _largest_magnitude(x: Array) -> Array:
    """As an integer, with infinity and then NaN above all: free to be taken in any order."""
    return jnp.max(_magnitude(x, x.dtype))


def _largest_of_local(x: Array) -> Array:
    """The same in one pass that reads x and writes nothing."""
    (largest,) = by_block((_magnitude(x.reshape(-1), x.dtype),), x.size, (jax.lax.max,))
    return largest[0]


def _magnitude(x: Any, dtype: Any) -> Array:
    dtype = wide_dtype(dtype)
    integer = jnp.dtype(f"int{bits_of(dtype)}")
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x).astype(dtype), integer)
    return bits & jnp.iinfo(integer).max


def like_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, without the array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def size_of(shape: Shape) -> int:
    """Number of elements of a shape; an integer counts as a one-dimensional shape.

    >>> size_of((3, 4)), size_of(()), size_of(7)
    (12, 1, 7)
    """
    return int(shape) if isinstance(shape, int | np.integer) else int(np.prod(shape, dtype=int))


def bits_of(dtype: Any) -> int:
    """Bits of one element of ``dtype``.

    >>> bits_of(jnp.bfloat16)
    16
    """
    return jnp.dtype(dtype).itemsize * 8


def joint_basis(*codecs: Codec) -> str:
    """What the constants of a codec made of others are worth: a bound, if those of all are known.

    >>> joint_basis()
    'bound'
    """
    return "bound" if all(codec.basis in ("exact", "bound") for codec in codecs) else "none"


def wide_dtype(dtype: Any) -> Any:
    """The dtype if it is float32 or wider, else float32; the same under strict promotion.

    >>> wide_dtype(jnp.bfloat16), wide_dtype(np.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"a leaf has dtype {dtype}, {FLOATING_ONLY}")
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def as_key(key: Any, name: str) -> Array:
    """Accepts an int, a typed key or a raw ``uint32[2]`` key; returns a typed key.

    Raises:
      TypeError: if ``key`` is None or something else, naming the compressor and the remedy.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        return jax.random.key(key)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if getattr(key, "dtype", None) == jnp.uint32 and getattr(key, "shape", None) == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(f"{name}: key={key!r} is not a random key; pass jax.random.key(0) or an int.")
