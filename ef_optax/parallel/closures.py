"""What a function uses that is not among its arguments."""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax


def used_by(fun: Any) -> list[Any]:
    """The leaves of what a function uses beside its arguments, as far as its code shows.

    These are variables of the functions around it, global variables, default values of arguments,
    attributes of ``self``, arguments of ``functools.partial``, and what functions found there use
    themselves (those that are global, only in the same file).

    >>> scale = 2.0
    >>> used_by(lambda x: scale * x), used_by(lambda x, y=3.0: x + y)
    ([2.0], [3.0])
    """
    found: list[Any] = []
    seen: set[int] = set()
    todo = [fun]
    while todo:
        fun = todo.pop()
        if id(fun) in seen:
            continue
        seen.add(id(fun))
        leaves = jax.tree.leaves(list(_values(fun)))
        found += [x for x in leaves if not callable(x)]
        todo += [x for x in leaves if callable(x)]
    return found


def _values(fun: Any) -> Iterator[Any]:
    if isinstance(fun, functools.partial):
        yield from (fun.func, fun.args, fun.keywords)
        return
    if not isinstance(fun, types.FunctionType | types.MethodType):
        yield from _wrapped_or_called(fun)
        return
    owner = getattr(fun, "__self__", None)
    fun = getattr(fun, "__func__", fun)
    yield from (fun.__defaults__, fun.__kwdefaults__)
    for cell in fun.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell, or a state that was consumed
            yield jax.tree.leaves(cell.cell_contents)
    own = getattr(owner, "__dict__", {})
    for instruction in _instructions(fun.__code__):
        name = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":
            value = fun.__globals__.get(name)
            if not callable(value) or getattr(value, "__globals__", None) is fun.__globals__:
                yield value
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and name in own:
            yield own[name]


def _wrapped_or_called(fun: Any) -> Iterator[Any]:
    """The function inside a transformed one (``jax.jit``), or that of a callable object."""
    call = getattr(type(fun), "__call__", None)  # noqa: B004  (its code is read)
    if hasattr(fun, "__wrapped__"):
        yield fun.__wrapped__
    elif isinstance(call, types.FunctionType):
        yield types.MethodType(call, fun)


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _instructions(inner)
