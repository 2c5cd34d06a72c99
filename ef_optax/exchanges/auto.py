"""The transport with the least traffic, chosen for each leaf from the exact bits of its message.

cost:   what one device sends and receives over its link, plus a price for each round
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.context import path_string
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._core.outcome import Protocol
from ef_optax._core.policy import WorkersPolicy, for_leaf, for_workers
from ef_optax._core.traits import Traits, common
from ef_optax._core.transport import AllGather, AllReduce, Transport
from ef_optax._core.workers import Workers
from ef_optax._exchange.links import Kind, link_amount
from ef_optax._numeric import check
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import Shape, like_of
from ef_optax.compressors.combine._single import single_codec
from ef_optax.compressors.compressor import Compressor, codec_of
from ef_optax.exchanges.carried import Carried
from ef_optax.exchanges.leader import Leader
from ef_optax.exchanges.two_shot import TwoShot

_WAYS: dict[str, tuple[Transport, tuple[Kind, ...]]] = {
    "gather": (AllGather(), ("gather",)),
    "reduce": (AllReduce(), ("reduce",)),
    "two_shot": (TwoShot(), ("all_to_all", "gather")),
    "leader": (Leader(), ("reduce", "reduce")),
}
"""The transports by name, the simplest first, and the kind of each of their rounds."""

WORTH = 1.05
"""A transport with more rounds must cost this much less than one with fewer."""


class Choice(NamedTuple):
    """How the message of one leaf travels."""

    path: str
    shape: Shape
    transport: str  # "given" if the leaf's compressor is not one of :func:`auto`
    link_bytes: dict[str, int]  # of a device, for each transport that fits; what was not chosen too
    reason: str


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choice for each leaf, in the order of the tree; printing it gives a table.

    Attributes:
      leaves: a :class:`Choice` for each leaf.
    """

    leaves: tuple[Choice, ...]

    def __str__(self) -> str:
        rows = [("leaf", "shape", "transport", "reason")]
        rows += [(c.path, str(c.shape), c.transport, c.reason) for c in self.leaves]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Auto(MessagelessCodec, WorkersPolicy):
    """``inner``, whose messages travel by the cheapest of some transports."""

    inner: Codec
    among: tuple[str, ...]
    round_bytes: int = 0

    why: ClassVar[str] = "its message is that of codec.inner. Ask codec.inner."

    @property
    def name(self) -> str:
        return f"{self.inner.name} by {' or '.join(self.among)}"

    @property
    def traits(self) -> Traits:
        """What holds whichever transport is chosen."""
        each = [_WAYS[way][0].traits(self.inner) for way in self.among]
        if all(one == each[0] for one in each):
            return each[0]
        return dataclasses.replace(common(*each), stateful=any(one.stateful for one in each))

    def for_workers(self, like: jax.ShapeDtypeStruct, num_workers: int) -> Codec:
        transport, _ = _WAYS[self.choice(like.shape, like.dtype, num_workers)]
        return self.inner if transport == self.inner.transport else Carried(self.inner, transport)

    def link_bits(self, way: str, shape: Shape, dtype: Any, num_workers: int) -> int:
        """What one device sends and receives with this transport."""
        transport, kinds = _WAYS[way]
        rounds = transport.traffic(self.inner, shape, dtype, num_workers)
        pairs = zip(kinds, rounds, strict=True)
        return sum(link_amount(kind, num_workers, bits) for kind, bits in pairs)

    def choice(self, shape: Shape, dtype: Any, num_workers: int) -> str:
        """The transport of the least cost; among those that are nearly as cheap, the simplest."""
        price = 8 * self.round_bytes
        costs = {
            way: self.link_bits(way, shape, dtype, num_workers) + price * len(_WAYS[way][1])
            for way in self.among
        }
        near = [way for way in costs if costs[way] <= WORTH * min(costs.values())]
        return min(near, key=lambda way: len(_WAYS[way][1]))

    def init(self, like: Any, path: str, num_workers: int) -> Any:
        return self.for_workers(like, num_workers).init(like, path, num_workers)

    def protocol(self, x: Array, state: Any, workers: Workers) -> Protocol:
        return self.for_workers(like_of(x), workers.size).protocol(x, state, workers)

    def traffic(self, shape: Shape, dtype: Any, num_workers: int) -> tuple[int, ...]:
        like = jax.ShapeDtypeStruct(shape, dtype)
        return self.for_workers(like, num_workers).traffic(shape, dtype, num_workers)

    def bits(self, shape: Shape, dtype: Any = jnp.float32) -> int:
        """Bits of one worker alone; see :meth:`traffic` for several."""
        return sum(self.traffic(shape, dtype, 1))

    def alpha(self, shape: Shape, num_workers: int = 1) -> float | None:
        return self._settled(shape, num_workers).alpha(shape, num_workers)

    def omega(self, shape: Shape, num_workers: int = 1) -> float | None:
        return self._settled(shape, num_workers).omega(shape, num_workers)

    def noise_error(self, shape: Shape, num_workers: int = 1) -> float:
        return self._settled(shape, num_workers).noise_error(shape, num_workers)

    def _settled(self, shape: Shape, num_workers: int) -> Codec:
        return self.for_workers(jax.ShapeDtypeStruct(shape, jnp.float32), num_workers)


def auto(
    compressor: Compressor, *, among: Sequence[str] | None = None, round_bytes: int = 0
) -> Compressor:
    """Chooses a transport for each leaf, by its size and the number of workers.

    The cost of a transport is what one device sends and receives over its link, from the exact bits
    of the message, plus ``round_bytes`` for each round. The cheapest is taken; one with more rounds
    only if it saves a twentieth. So the messages of few workers are gathered, and those of many
    travel by shards, after a leader, or dense. :func:`choices` lists what is chosen and why.

    Not all transports compute the same. ``gather`` and ``reduce`` average the workers' messages;
    ``two_shot`` compresses the average again, with a residual of its own; with ``leader`` one
    worker chooses the positions for all. ``among=("gather", "reduce")`` leaves the iterates as they
    are, and rules that need the mean of what was sent take no other.

    To choose for some leaves yourself, put :func:`ef_optax.per_leaf` around it:
    ``per_leaf(lambda path, leaf: two_shot(C) if path == "embedding" else auto(C))``.

    Args:
      compressor: what is sent; a stateless compressor of single leaves.
      among: the transports to choose from, of ``"gather"``, ``"reduce"``, ``"two_shot"`` and
        ``"leader"``; None is all that fit the compressor.
      round_bytes: what a round costs beside its bytes: the bytes that a device could send and
        receive in the latency of a round, 2 x latency x bandwidth / 8.

    Returns:
      The compressor. Bits: those of the chosen transport. It has the properties that all of its
      transports have.

    Raises:
      TypeError: if ``compressor`` is not a stateless Compressor of single leaves whose message one
        worker encodes alone.
      ValueError: for an unknown transport, or one that does not fit; for a negative
        ``round_bytes``.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> params = {"w": jnp.zeros((256, 256)), "b": jnp.zeros(256)}
      >>> for workers in (2, 64):
      ...     print(ef.exchanges.choices(ef.exchanges.auto(ef.scaled_sign()), params, workers))
      leaf  shape       transport  reason
      b     (256,)      gather     72 bytes; reduce 2,048; two_shot 80
      w     (256, 256)  gather     16,392 bytes; reduce 524,288; two_shot 16,400
      leaf  shape       transport  reason
      b     (256,)      two_shot   1,134 bytes; gather 4,536; reduce 4,032
      w     (256, 256)  two_shot   33,264 bytes; gather 1,032,696; reduce 1,032,192

    References:
      The choice between ring, gather and sharded exchanges by size is that of MPI and NCCL; the
      costs are those of ``docs/wire.md``.
    """
    codec = single_codec(compressor, "auto", "compressor")
    check.count("auto", "round_bytes", round_bytes, least=0)
    if among is None:
        ways = [w for w in _WAYS if all(need.met(codec) for need in _WAYS[w][0].needs)]
        return Compressor(Auto(codec, tuple(ways), round_bytes))
    named = isinstance(among, Sequence) and not isinstance(among, str) and len(among) > 0
    if not (named and set(among) <= set(_WAYS)):
        raise ValueError(f"auto: among={among!r} must be some of {', '.join(_WAYS)}.")
    for way in among:
        for need in _WAYS[way][0].needs:
            need.check(f"auto: compressor, for among={way!r},", codec)
    return Compressor(Auto(codec, tuple(w for w in _WAYS if w in among), round_bytes))


def choices(compressor: Compressor, params: Any, num_workers: int) -> Choices:
    """What :func:`auto` chooses for each leaf, with the bytes of all transports that fit.

    Args:
      compressor: one of :func:`auto`, or a :func:`ef_optax.per_leaf` that returns some.
      params: a tree of arrays or of their shapes; of the slices, if parameters are split over model
        axes.
      num_workers: the number of workers.

    Returns:
      A :class:`Choices`, whose ``leaves`` has a row for each leaf; printing it gives a table.

    Raises:
      TypeError: if ``compressor`` is not a Compressor.
      ValueError: for a number of workers below 1.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> (chosen,) = ef.exchanges.choices(
      ...     ef.exchanges.auto(ef.top_k(k=8)), jnp.zeros(1024), 8).leaves
      >>> chosen.transport, chosen.link_bytes["gather"], chosen.link_bytes["leader"]
      ('leader', 588, 147)
    """
    codec = codec_of(compressor)
    check.count("choices", "num_workers", num_workers)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        like = jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        own = for_leaf(codec, path_string(path), like)
        rows.append(_row(own, path_string(path), like, num_workers))
    return Choices(tuple(rows))


def _row(codec: Codec, path: str, like: jax.ShapeDtypeStruct, num_workers: int) -> Choice:
    if not isinstance(codec, Auto):
        used = for_workers(codec, like, num_workers)
        return Choice(path, like.shape, "given", {}, f"the compressor of this leaf is {used.name}")
    wide = jnp.promote_types(like.dtype, jnp.float32)  # the dtype in which rules exchange
    link = {w: -(-codec.link_bits(w, like.shape, wide, num_workers) // 8) for w in codec.among}
    way = codec.choice(like.shape, wide, num_workers)
    others = [f"{name} {count:,}" for name, count in link.items() if name != way]
    reason = "; ".join([f"{link[way]:,} bytes", *others])
    return Choice(path, like.shape, way, link, reason)
