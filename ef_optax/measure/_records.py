"""The records of all monitored exchanges in a state, as one number for each leaf and quantity."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ef_optax._core.context import path_string
from ef_optax._exchange.exchange import ExchangeState
from ef_optax._exchange.monitored import DENSE, GRADIENT, MOMENTS, TRAFFIC, asked
from ef_optax._numeric.dtypes import Array
from ef_optax._rules.memory import Memory
from ef_optax._rules.residuals import ResidualPolicyState
from ef_optax._rules.stored import Stored

MEMORY_OF = {"exchange": "residual", "uplink": "residual", "downlink": "server_residual"}
"""The field with the residual of an exchange, for the fields in which rules have exchanges."""

ESTIMATES = {"estimate", "control", "broadcast"}
"""The fields of rules that send differences to an estimate."""


class Found(NamedTuple):
    """One monitored exchange of a state."""

    name: str  # empty if it is the only one
    state: ExchangeState
    residual: Any = None  # what the rule did not send; () for an estimate, None without a memory
    dropped: Any = None  # of each leaf, the mass that a policy dropped; None without


def monitored_exchanges(opt_state: Any) -> list[Found]:
    """All monitored exchanges, in the order of the state.

    Raises:
      ValueError: if there are none.
    """
    found = [one for one in _exchanges(opt_state) if one.state.monitor]
    if not found:
        raise ValueError(
            "opt_state has no monitored exchange; make it with the init of "
            "ef_optax.monitor(chain), which may be inside data_parallel or simulate."
        )
    parts = [one.name.split("/") for one in found]
    common = os.path.commonprefix(parts)
    return [
        one._replace(name="/".join(own[len(common) :]))
        for one, own in zip(found, parts, strict=True)
    ]


def _exchanges(opt_state: Any) -> Iterator[Found]:
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_end):
        place = [path_string(path)] if path else []
        if isinstance(node, ExchangeState):
            yield Found("/".join(place), node)
        elif isinstance(node, ResidualPolicyState):
            for one in _exchanges(node.rule):
                name = "/".join([*place, *([one.name] if one.name else [])])
                yield one._replace(name=name, dropped=node.dropped)
        elif _has_exchange(node):
            estimate = () if ESTIMATES & set(node._fields) else None
            for field, value in zip(node._fields, node, strict=True):
                memory = getattr(node, MEMORY_OF.get(field, ""), estimate)
                for inner, one in jax.tree_util.tree_leaves_with_path(value, is_leaf=_is_exchange):
                    if _is_exchange(one):
                        names = [*place, field, *([path_string(inner)] if inner else [])]
                        yield Found("/".join(names), one, memory)


def _is_end(x: Any) -> bool:
    return isinstance(x, ResidualPolicyState) or _has_exchange(x)


def _is_exchange(x: Any) -> bool:
    return isinstance(x, ExchangeState)


def _has_exchange(x: Any) -> bool:
    """Whether this is an exchange, or the state of a rule that has one."""
    if _is_exchange(x) or not (isinstance(x, tuple) and hasattr(x, "_fields")):
        return _is_exchange(x)
    flat = [y for field in x for y in (field if type(field) is tuple else (field,))]
    return any(map(_is_exchange, flat))


def leaf_names(found: Found) -> list[str]:
    """The paths of the leaves of an exchange."""
    located = jax.tree_util.tree_leaves_with_path(found.state.monitor.size)
    return [path_string(path) or "params" for path, _ in located]


def sums(found: Found) -> dict[str, Array]:
    """The recorded quantities of an exchange, each a vector with an entry for each leaf.

    Sums over entries are means over the workers. Quantities that are not recorded are missing.
    """
    monitor = found.state.monitor
    result = {
        **_columns(monitor.moments, MOMENTS),
        **_columns(monitor.traffic, TRAFFIC),
        **_columns(monitor.gradient, GRADIENT),
    }
    if asked(monitor.dense):
        result |= _columns(monitor.dense, DENSE)
    if asked(monitor.loss):
        result["loss"] = _mean_of_workers(monitor.loss, 1)
    result["size"] = size = _vector([x.astype(jnp.float32) for x in jax.tree.leaves(monitor.size)])
    if asked(monitor.age):
        ages = jax.tree.leaves(monitor.age)
        result["age"] = size * _vector([_mean(x.astype(jnp.float32)) for x in ages])
        result["oldest"] = _vector([jnp.max(x, initial=0).astype(jnp.float32) for x in ages])
    if found.residual is not None:
        result |= {"residual": result["error"], "residual_zeros": result["error_zeros"]}
        result |= _of_memory(found.residual, jax.tree.structure(monitor.size), size)
    if found.dropped is not None:
        result["dropped"] = _vector([jnp.mean(x) for x in jax.tree.leaves(found.dropped)])
    return result


def _of_memory(residual: Any, treedef: Any, size: Array) -> dict[str, Array]:
    """The sums over a residual like the input; nothing if there is none."""
    is_stored = lambda x: isinstance(x, Stored)  # noqa: E731
    stored = [x for x in jax.tree.leaves(residual, is_leaf=is_stored) if is_stored(x)]
    if any(x.form.sliced for x in stored):  # slices can only be read inside the lift
        return {}
    leaves, found = jax.tree.flatten(Memory.read(residual))
    if found != treedef:
        return {}
    # There may be a leading worker axis, so these are means over the entries times their number.
    squares = size * _vector([_mean(jnp.square(x)) for x in leaves])
    zeros = size * _vector([_mean((x == 0).astype(jnp.float32)) for x in leaves])
    result = {"residual": squares, "residual_zeros": zeros, "memory": squares}
    if len(stored) == len(leaves) and not any(isinstance(x.lost, tuple) for x in stored):
        result["rounded"] = _vector([jnp.mean(x.lost) for x in stored])
    return result


def _columns(rows: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """The columns of a matrix with a row for each leaf, by name."""
    table = _mean_of_workers(rows, 2)
    return {name: table[:, i] for i, name in enumerate(names)}


def _mean_of_workers(x: Array, ndim: int) -> Array:
    """The mean over the workers, if each has its own array of so many dimensions."""
    return jnp.mean(x, 0) if x.ndim > ndim else x


def _mean(x: Array) -> Array:
    return jnp.sum(x).astype(jnp.float32) / max(x.size, 1)


def _vector(numbers: list[Array]) -> Array:
    return jnp.stack(numbers) if numbers else jnp.zeros(0, jnp.float32)
