"""Bundles: the leaves that one protocol handles together, which keeps compile times short."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ef_optax._core import context
from ef_optax._core.codec import Codec
from ef_optax._core.joinable import Joinable, JointCodec
from ef_optax._core.once import identity_of
from ef_optax._exchange.joined import Joined, of_whole_rows, that_fit, with_zeros
from ef_optax._exchange.stack import Stacked, stackable
from ef_optax._numeric import offsets
from ef_optax._numeric.dtypes import Array
from ef_optax._numeric.shapes import like_of


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Leaves that one protocol handles.

    They are a single leaf, a stack of equal leaves, or a list (a codec's group, the leaves of a
    family, or those that become one vector).
    """

    codec: Codec
    members: tuple[int, ...]
    kind: str  # "leaf", "stack" or "group"

    def take(self, values: Sequence[Any]) -> Any:
        own = [values[i] for i in self.members]
        if self.kind == "leaf":
            return own[0]
        return own if self.kind == "group" else jax.tree.map(lambda *xs: jnp.stack(xs), *own)

    def shares(self, codecs: Sequence[Codec], leaves: Sequence[Array]) -> list[int]:
        """Numbers to which the members' parts of the bundle's cost are proportional."""
        own = [(codecs[i], leaves[i]) for i in self.members]
        by_bits = isinstance(self.codec, JointCodec)
        return [c.bits(x.shape, x.dtype) if by_bits else x.size for c, x in own]

    def give(self, value: Any, rows: Sequence[Array | int]) -> list[Any]:
        """The parts of the members; ``rows`` are the numbers 0, 1, ... as data."""
        if self.kind == "leaf":
            return [value]
        if self.kind == "group":
            return list(value)
        own = rows[: len(self.members)]
        return [offsets.row(value, number) for number in own]


def bundles_of(
    codecs: Sequence[Codec],
    leaves: Sequence[Array],
    specs: Sequence[Any],
    paths: Sequence[str] | None = None,
) -> list[Bundle]:
    """Groups the leaves, so that the program compiles quickly.

    Leaves of whole blocks become one vector, if their codec compresses each block by itself, and so
    do small leaves of other sizes, if it ignores zeros. Equal small leaves are stacked. Other
    leaves of a family are handled together, if their codec can.

    Args:
      codecs: the codec of each leaf.
      leaves: the leaves, or their shapes and dtypes.
      specs: how each leaf is split over model axes, or None.
      paths: the names of the leaves, for errors.

    Raises:
      ValueError: for more values than a codec takes (:attr:`Codec.most_values`).
    """
    groups: dict[Any, list[int]] = {}
    for i, (one, x) in enumerate(zip(codecs, leaves, strict=True)):
        if one.granularity == "group":
            # The codec of a group reads all its members, so they must be split alike: the result
            # for a leaf that is not split must not depend on a slice of another leaf.
            key: Any = ("group", identity_of(one), context.spec_axes(specs[i]))
        elif of_whole_rows(one, x):
            key = ("joined", identity_of(one), x.dtype, specs[i])
        elif (family := _family_of(one, x)) is not None:
            key = ("joint", identity_of(one), family, x.dtype, specs[i])
        elif with_zeros(one, x):
            key = ("padded", identity_of(one), x.dtype, specs[i])
        elif stackable(one, x):
            key = ("stack", identity_of(one), x.shape, x.dtype, specs[i])
        else:
            key = ("leaf", i)
        groups.setdefault(key, []).append(i)
    bundles = []
    for kind, members in _by_kind(groups, codecs, leaves):
        one, x = codecs[members[0]], leaves[members[0]]
        for together in [members] if kind == "group" else [[i] for i in members]:
            _require_fit(one, [leaves[i] for i in together], paths[together[0]] if paths else "")
        equal = all(leaves[i].shape == x.shape for i in members)
        stacked = kind in ("stack", "joint", "padded") and equal and stackable(one, x)
        if stacked and len(members) > 1:
            bundles.append(Bundle(Stacked(one), tuple(members), "stack"))
        elif kind in ("joined", "padded") and len(members) > 1:
            bundles.append(Bundle(Joined(one), tuple(members), "group"))
        elif kind == "joint" and len(members) > 1:
            assert isinstance(one, Joinable)
            bundles.append(Bundle(one.joint(like_of(x)), tuple(members), "group"))
        else:
            bundles.append(Bundle(one, tuple(members), "group" if kind == "group" else "leaf"))
    return bundles


def states_of(
    codecs: Sequence[Codec], likes: Sequence[Any], paths: Sequence[str], num_workers: int
) -> list[Any]:
    """The first state of each leaf; equal codecs make those of all their leaves at once."""
    groups: dict[Hashable, list[int]] = {}
    for i, codec in enumerate(codecs):
        groups.setdefault(identity_of(codec), []).append(i)
    states: list[Any] = [()] * len(codecs)
    for members in groups.values():
        own = [likes[i] for i in members], [paths[i] for i in members]
        made = codecs[members[0]].init_each(*own, num_workers)
        for i, state in zip(members, made, strict=True):
            states[i] = state
    return states


def _by_kind(
    groups: dict[Any, list[int]], codecs: Sequence[Codec], leaves: Sequence[Array]
) -> Iterator[tuple[str, list[int]]]:
    """The kinds and members of the groups; what does not fit into a joined vector stays apart."""
    for (kind, *_), members in groups.items():
        fitting, one, x = members, codecs[members[0]], leaves[members[0]]
        copied = isinstance(one, Joinable) and kind == "joint" and one.copied(like_of(x))
        if copied:  # equal leaves follow each other, which makes fewer programs
            members.sort(key=lambda i: leaves[i].size)
        if copied or kind in ("joined", "padded"):
            fitting = [members[i] for i in that_fit([leaves[i].size for i in members])]
        if fitting:
            yield kind, fitting
        yield from (("leaf", [i]) for i in members if i not in fitting)


def _require_fit(codec: Codec, leaves: Sequence[Array], path: str) -> None:
    """Refuses leaves that have more values than their codec can number.

    Raises:
      ValueError: with the name of the (first) leaf and the remedy.
    """
    values = sum(x.size for x in leaves)
    if values <= codec.most_values:
        return
    what = f"the leaf {path!r} has" if len(leaves) == 1 else f"{path!r} and others together have"
    raise ValueError(
        f"{what} {values} values, but {codec.name} numbers them in 32 bits and takes at most "
        f"{codec.most_values}. Split the leaf, over a model axis or into several leaves (stacked "
        "layers); compress leaf by leaf; or send it with ef_optax.scaled_sign() or dense: "
        "ef_optax.per_leaf(lambda path, leaf: ef_optax.identity() if leaf.size >= 2**31 else C)."
    )


def _family_of(codec: Codec, x: Array) -> Hashable | None:
    """The family of a leaf that may be joined with others, else None."""
    if not (isinstance(codec, Joinable) and codec.self_contained):
        return None
    return codec.family(like_of(x))
