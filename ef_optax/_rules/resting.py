"""Memories that are in the host's memory between two steps.

A step computes in the device's memory. What is stored on the host is brought there when the
outermost transformation begins, and put back when it ends: rules, policies and the skip of a bad
step between them see arrays on the device only. Both ways are part of the compiled program.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ef_optax._rules.stored import Stored, to_host

HOST = "pinned_host"
"""JAX's name for memory of the host that devices can copy from and to."""

_COMPUTING: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "ef_optax_computing", default=False
)


def require_host_memory() -> None:
    """Refuses devices that cannot use the host's memory.

    Raises:
      ValueError: with what the devices have and the remedy.
    """
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(
            f"memory=on_host(...): {device.device_kind} devices of platform {device.platform!r} "
            f"have no {HOST!r} memory, only {kinds}. Leave on_host out and store the memory in "
            "fewer bytes, such as memory=ef_optax.block_quantize(4, block=128, key=0)."
        )


def begun(init: Callable[[Any], Any], params: Any) -> Any:
    """The state that ``init`` makes, put away."""
    if _COMPUTING.get():
        return init(params)
    with _computing():
        state = init(params)
    return put_away(state)


def stepped(update: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[Any, Any]:
    """What ``update(state)`` returns: a result, and the next state, which is put away."""
    if _COMPUTING.get():
        return update(state)
    with _computing():
        result, after = update(fetched(state))
    return result, put_away(after)


def fetched(state: Any) -> Any:
    """A state whose memories are all on the device."""
    return jax.tree.map(lambda x: x.fetched() if _is_stored(x) else x, state, is_leaf=_is_stored)


def put_away(state: Any) -> Any:
    """A state whose memories are where they are between two steps."""
    return jax.tree.map(lambda x: x.put_away() if _is_stored(x) else x, state, is_leaf=_is_stored)


def returned(state: Any) -> Any:
    """A state as between two steps, whose arrays may be elsewhere, with those of the host there."""
    return jax.tree.map(lambda x, host: to_host(x) if host else x, state, kinds(state))


def kinds(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """For each leaf of a tree like a state whether it is on the host between two steps."""

    def of(on_host: bool, part: Any) -> Any:
        return jax.tree.map(lambda _: on_host, part, is_leaf=is_leaf)

    def one(x: Any) -> Any:
        if not _is_stored(x):
            return of(False, x)
        return Stored(of(x.form.host, x.message), of(False, x.lost), x.form)

    stop = _is_stored if is_leaf is None else lambda x: _is_stored(x) or is_leaf(x)
    return jax.tree.map(one, tree, is_leaf=stop)


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    token = _COMPUTING.set(True)
    try:
        yield
    finally:
        _COMPUTING.reset(token)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)
