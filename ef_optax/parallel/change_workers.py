"""Continuing with another number of workers; the mean of the residuals is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_optax._numeric import trees
from ef_optax._numeric.dtypes import wide_dtype
from ef_optax._numeric.linear import einsum
from ef_optax._rules.stored import Kept, Stored
from ef_optax.exchanges.delayed import OnItsWay

MEAN, FRESH, COPY, SHARDS, OPTIMIZER = "mean", "fresh", "copy", "shards", "optimizer"
"""Roles of a State's per-worker fields: keep the mean, use the new start, copy worker 0's row, cut
the concatenation of all rows into new rows, or each leaf as an optimizer needs it."""


def overlap_weights(old: int, new: int) -> np.ndarray:
    """The matrix that turns ``old`` rows into ``new`` rows with the same mean.

    ``W[j, i] = new * |[i/old, (i+1)/old) intersected with [j/new, (j+1)/new)|``: rows sum to 1,
    columns to new/old. It averages groups of rows if ``new`` divides ``old``, and repeats rows if
    ``old`` divides ``new``.

    >>> overlap_weights(4, 2).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    i, j = np.arange(old), np.arange(new)[:, None]
    low = np.maximum(i / old, j / new)
    high = np.minimum((i + 1) / old, (j + 1) / new)
    return new * np.clip(high - low, 0.0, None)


def change_workers(state: Any, fresh: Any) -> Any:
    """Carries a lifted state over to another number of workers.

    Leaves that are equal on all workers are kept. A per-worker leaf is handled by the role that its
    State class gives the field (``roles``): ``"mean"`` (the default for floating leaves, such as
    residuals and estimates) mixes rows so that their mean is unchanged for any n and m; ``"fresh"``
    (the default for integers and keys) takes the value of ``fresh``; ``"copy"`` repeats worker 0's
    row; ``"shards"`` cuts the rows, which together are one array, into new rows; ``"optimizer"``
    keeps the mean of floating leaves, worker 0's integers (the count that belongs to these moments)
    and new keys. Messages that are on their way (:func:`ef_optax.exchanges.delayed`) return to the
    residuals they were taken from.

    Args:
      state: the state with n workers.
      fresh: ``tx.init(params)`` of the same chain, lifted to m workers; it gives the shapes, the
        devices and new keys.

    Returns:
      A state like ``fresh``, on its devices. If m = n, the values are those of ``state``, bit for
      bit.

    Raises:
      ValueError: if the two states do not come from the same chain.

    Example:
      >>> import ef_optax as ef, jax.numpy as jnp
      >>> tx = ef.error_feedback(ef.top_k(k=1), axis_name="w")
      >>> two, three = ef.simulate(tx, 2, "w"), ef.simulate(tx, 3, "w")
      >>> state = two.init(jnp.zeros(2))
      >>> state = state._replace(residual=jnp.array([[3.0, 0.0], [0.0, 6.0]]))
      >>> ef.parallel.change_workers(state, three.init(jnp.zeros(2))).residual.mean(0).tolist()
      [1.5, 3.0]
    """
    if jax.tree.structure(state) != jax.tree.structure(fresh):
        raise ValueError(
            "change_workers: state and fresh come from different chains: "
            f"{trees.difference(state, fresh)}."
        )
    state = _landed(state, fresh)
    return jax.tree.map(_carry_leaf, state, fresh, roles_of(state), is_leaf=_is_kept)


def _landed(state: Any, fresh: Any) -> Any:
    """The state with messages that are on their way back in the residuals they were taken from.

    Messages cannot be mixed. The mean of residual and message is kept, and nothing is on its way.
    """

    def one(old: Any, new: Any) -> Any:
        if not _has_residual(old):
            return old
        started = jax.tree.leaves(new.exchange.codec, is_leaf=_is_on_its_way)
        codecs, treedef = jax.tree.flatten(old.exchange.codec, is_leaf=_is_on_its_way)
        pairs = list(zip(codecs, started, strict=True))
        if not any(_is_on_its_way(c) and not _same_shapes(c, s) for c, s in pairs):
            return old
        residual = jax.tree.map(_with_message, old.residual, old.exchange.codec, is_leaf=_is_kept)
        begun = [s if _is_on_its_way(c) else c for c, s in pairs]
        return old._replace(
            residual=residual, exchange=old.exchange._replace(codec=treedef.unflatten(begun))
        )

    return jax.tree.map(one, state, fresh, is_leaf=_has_residual)


def _has_residual(x: Any) -> bool:
    return {"residual", "exchange"} <= set(getattr(x, "_fields", ()))


def _is_on_its_way(x: Any) -> bool:
    return isinstance(x, OnItsWay)


def _same_shapes(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.shape == y.shape for x, y in pairs)


def _with_message(residual: Any, codec: Any) -> Any:
    """A leaf of a residual, plus what is on its way of it."""
    if not _is_on_its_way(codec):
        return residual
    if _is_kept(residual) or residual.shape[1:] != codec.form.like.shape:
        raise ValueError(
            "change_workers: a delayed message of a leaf that is split over model axes, or whose "
            "residual is stored by a compressor (memory=), cannot be added to it; apply it first "
            "by a step with zero gradients, or keep the number of workers."
        )
    return residual + codec.of_workers().astype(residual.dtype)


def _is_kept(x: Any) -> bool:
    return isinstance(x, Kept)


def _carry_leaf(old: Any, new: Any, role: Any) -> Any:
    """A leaf of the state; what a rule remembers in the form of messages is mixed decoded."""
    if not _is_kept(old):
        return _carry(old, new, role)
    before, after = jax.tree.leaves(old), jax.tree.leaves(new)
    same = all(a.shape == b.shape for a, b in zip(before, after, strict=True))
    if isinstance(old, Stored) and not old.form.like.size:
        return new
    if same or {FRESH, COPY} & set(jax.tree.leaves(role)):
        return jax.tree.map(_carry, old, new, role)
    weights = overlap_weights(len(before[0]), len(after[0]))
    return jax.tree.map(_placed, old.mixed(weights), new)


def _carry(old: Any, new: Any, role: str) -> Any:
    if old.shape == new.shape:
        return _placed(old, new)
    if role == SHARDS:
        flat = old.reshape(-1)[: new.size]  # beyond the leaf's size there is only padding
        return _placed(jnp.pad(flat, (0, new.size - flat.size)).reshape(new.shape), new)
    if old.ndim != new.ndim or old.shape[1:] != new.shape[1:]:
        raise ValueError(
            f"change_workers: a leaf of shape {old.shape} cannot become {new.shape}; only the "
            "leading worker axis may change."
        )
    if role == OPTIMIZER:
        kinds = {jnp.floating: MEAN, jnp.integer: COPY, jnp.bool_: COPY}
        role = next((r for kind, r in kinds.items() if jnp.issubdtype(old.dtype, kind)), FRESH)
    if role == FRESH or (role == "" and not jnp.issubdtype(old.dtype, jnp.floating)):
        return new
    if role == COPY:
        value = jnp.broadcast_to(old[:1], new.shape)
    else:
        wide = wide_dtype(old.dtype)
        weights = jnp.asarray(overlap_weights(old.shape[0], new.shape[0]), wide)
        value = einsum("mn,n...->m...", weights, old.astype(wide)).astype(old.dtype)
    return _placed(value, new)


def _placed(value: Any, like: Any) -> Any:
    """The value on the devices of the new state, which may be others even for equal shapes."""
    return jax.device_put(value, like.sharding) if hasattr(like, "sharding") else value


def roles_of(state: Any, role: str = "") -> Any:
    """The role of every leaf, from the innermost State class that has a role for its field."""
    names = getattr(state, "_fields", None)
    if isinstance(state, tuple) and names is not None:
        named = getattr(type(state), "roles", {})
        fields = zip(names, state, strict=True)
        return type(state)(*(roles_of(value, named.get(name, role)) for name, value in fields))
    is_state = lambda x: isinstance(x, tuple) and hasattr(x, "_fields")  # noqa: E731
    one = lambda x: roles_of(x, role) if is_state(x) else role  # noqa: E731
    return jax.tree.map(one, state, is_leaf=is_state)
