"""The part of an exchange that chooses among the levels of a controlled codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._core.codec import Codec
from ef_optax._core.control import LevelPolicy
from ef_optax._core.policy import for_leaf
from ef_optax._exchange import collectives as coll
from ef_optax._exchange import slices
from ef_optax._exchange.monitored import over_all_slices
from ef_optax._numeric import moments
from ef_optax._numeric.dtypes import Array

if TYPE_CHECKING:
    from ef_optax._exchange.exchange import Exchange


class ControlState(NamedTuple):
    """What an exchange with a controlled codec remembers."""

    level: Array  # int32 scalar: of the next exchange
    waited: Array  # int32 scalar: exchanges since the last decision
    sums: Any  # per worker, float32 (2,): of x and of x - C(x) since then; () if not measured
    memory: Any  # what the controller remembers


def begin(exchange: Exchange, tree: Any) -> Any:
    """The state before the first exchange of ``tree``; () for a codec without a controller.

    Raises:
      ValueError: if a controlled codec is inside another policy.
    """
    codec, (paths, likes, _) = exchange.codec, exchange.located(tree)
    if not isinstance(codec, LevelPolicy):
        for path, like in zip(paths, likes, strict=True):
            _require_outermost(for_leaf(codec, path, like), path)
        return ()
    controller = codec.controller
    level, memory = controller.begin(_costs(codec, paths, likes))
    return ControlState(
        level=jnp.asarray(level, jnp.int32),
        waited=jnp.zeros((), jnp.int32),
        sums=jnp.zeros(2, jnp.float32) if controller.measures else (),
        memory=memory,
    )


def clock(codec: Codec, control: Any, step: Array) -> Array:
    """What chooses the stage of a codec: the step, or the level."""
    return control.level if isinstance(codec, LevelPolicy) else step


def measures(codec: Codec) -> bool:
    """Whether an exchange needs :func:`measured`."""
    return isinstance(codec, LevelPolicy) and codec.controller.measures


def measured(
    leaves: Sequence[Array],
    errors: Sequence[Array],
    split: Sequence[tuple[str, ...]],
    axis: coll.AxisName,
) -> Array:
    """The squared norms of this worker's input and of what it does not send, over all slices."""
    rows = jnp.stack([moments.squared_norms(leaves), moments.squared_norms(errors)], 1)
    return coll.to_varying(jnp.sum(over_all_slices(rows, split), 0), axis)


def after(exchange: Exchange, control: Any, seen: Any, tree: Any) -> Any:
    """The state after an exchange in which ``seen`` was :func:`measured`, or () if not needed."""
    codec, axis = exchange.codec, exchange.axis_name
    if not isinstance(codec, LevelPolicy):
        return control
    controller, costs = codec.controller, _costs(codec, *exchange.located(tree)[:2])
    waited = control.waited + 1
    due = waited >= controller.window
    if controller.measures:
        own = control.sums + seen
        nothing = lambda: jnp.zeros(2, jnp.float32)  # noqa: E731
        total = coll.agreed_cond(due, lambda: coll.psum(own, axis), nothing, axis=axis)
        contraction = 1 - total[1] / jnp.where(total[0] > 0, total[0], 1)
        sums = jnp.where(due, 0, own)
    else:
        contraction, sums = None, ()
    level, memory = controller.decide(control.level, control.memory, costs, contraction)
    choose = lambda new, old: jnp.where(due, new, old)  # noqa: E731
    level, memory = jax.tree.map(choose, (level, memory), (control.level, control.memory))
    return ControlState(level, jnp.where(due, 0, waited), sums, memory)


def _costs(
    codec: LevelPolicy, paths: Sequence[str], likes: Sequence[jax.ShapeDtypeStruct]
) -> tuple[int, ...]:
    """Bytes of one worker's message at each level; of all slices, if leaves are split."""
    levels = len(codec.stages.stages)
    specs, total = slices.leaf_specs(paths), [0] * levels
    for i, (path, like) in enumerate(zip(paths, likes, strict=True)):
        own = for_leaf(codec, path, like)
        count = 1 if specs is None else slices.slice_count(specs[i])
        for level in range(levels):
            chosen = own.at(level) if isinstance(own, LevelPolicy) else own
            total[level] += count * chosen.bits(like.shape, like.dtype)
    return tuple(-(-bits // 8) for bits in total)


def _require_outermost(codec: Codec, path: str) -> None:
    """Refuses a controller that other policies have chosen for one leaf or for some steps."""
    if isinstance(codec, LevelPolicy) or any(
        isinstance(inner, LevelPolicy) for inner in getattr(codec, "codecs", ())
    ):
        raise ValueError(
            f"the compressor of the leaf {path!r} has a controller, but a controller chooses for "
            "all leaves together; make it the outermost compressor, and give it levels that are "
            "per_leaf compressors."
        )
