"""Calls that are traced once for equal arguments.

Tracing takes most of the start-up time of a small program, and a codec is traced many times: for
each bundle of equal leaves, when the state is inferred, at the first update, and by every other
rule with an equal codec. JAX caches the trace of a ``jit``, so codecs are called through one. XLA
compiles the same program as without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ef_optax._numeric.random import is_key

_ARRAYS = jax.Array | np.ndarray | np.generic


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """A method and its static arguments; two of them are equal if they do the same."""

    method: Callable[..., Any]
    treedef: Any  # of all arguments
    static: tuple[Hashable, ...]  # one for each argument; None for an array
    identity: Hashable  # the method's name, and the identity of its object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Work) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> Hashable:
        return self.identity, self.treedef, self.static


@functools.partial(jax.jit, static_argnums=0)
def _traced(work: _Work, arrays: list[Any]) -> Any:
    rest = iter(arrays)
    leaves = [next(rest) if one is None else one for one in work.static]
    return work.method(*jax.tree.unflatten(work.treedef, leaves))


def traced_once(method: Callable[..., Any], *args: Any) -> Any:
    """``method(*args)`` of a frozen dataclass, traced once for equal objects and arguments.

    Args:
      method: a bound method whose result depends only on its object and its arguments.
      *args: trees of arrays and of static, hashable values.

    >>> import dataclasses, jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True)
    ... class Scale:
    ...     factor: float
    ...     def times(self, x):
    ...         print("traced")
    ...         return self.factor * x
    >>> both = [traced_once(Scale(2.0).times, jnp.ones(3)) for _ in range(2)]
    traced
    """
    owner = getattr(method, "__self__")  # noqa: B009
    if _holds_tracer(owner):  # a tracer belongs to one trace and must not be cached for another
        return method(*args)
    leaves, treedef = jax.tree.flatten(args)
    arrays = [x for x in leaves if isinstance(x, _ARRAYS)]
    static = tuple(None if isinstance(x, _ARRAYS) else x for x in leaves)
    name = getattr(method, "__name__")  # noqa: B009
    return _traced(_Work(method, treedef, static, (name, identity_of(owner))), arrays)


def identity_of(value: Any) -> Hashable:
    """A key that is equal for codecs that do the same; fields that are arrays count by object."""
    if isinstance(value, tuple):
        return tuple(identity_of(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return type(value), *(identity_of(v) for v in fields)
    known = isinstance(value, int | float | str | bool | None)
    return (type(value), value) if known else id(value)


def by_value(codec: Any) -> Hashable:
    """A key that is equal for codecs with equal hyper-parameters; concrete random keys too.

    It serves as static data of a state, which must be the same in another process.
    """
    if isinstance(codec, tuple):
        return tuple(by_value(part) for part in codec)
    if dataclasses.is_dataclass(codec) and not isinstance(codec, type):
        fields = [getattr(codec, field.name) for field in dataclasses.fields(codec)]
        return type(codec), *(by_value(value) for value in fields)
    if is_key(codec) and not isinstance(codec, Tracer):
        with jax.ensure_compile_time_eval():  # a trace would make an array of the program of it
            return str(codec.dtype), np.asarray(jax.random.key_data(codec)).tobytes()
    return identity_of(codec)


def _holds_tracer(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_holds_tracer(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_tracer(getattr(value, f.name)) for f in dataclasses.fields(value))
    return isinstance(value, Tracer)
