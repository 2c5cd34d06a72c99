"""Which results of a traced function differ between workers, read from its equations.

A value differs along a worker axis if it is computed from one that does, or from the worker's
index. A sum, a maximum or a gather over the axis is equal on all workers again. One pass over the
equations of a trace gives the answer for every result; tracing the function again for every
question would run all its Python.

The answers are those of ``vmap`` over the axis. If the predicate of a condition differs, all its
results differ (``vmap`` takes both branches and selects). So a collective under such a condition,
at which a mesh would hang, is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

Axes = frozenset[str]
NOWHERE: Axes = frozenset()

_REDUCE = {"psum", "pmax", "pmin", "psum_invariant", "all_gather", "all_gather_invariant"}
"""Collectives whose result is equal along the axes that they name."""

_RETYPE = {"pvary", "preduced"}
"""Primitives that name axes and move no data."""


class Dataflow:
    """Answers for one trace; a function is analysed once for equal axes of its arguments."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, tuple[Axes, ...]], tuple[Axes, ...]] = {}

    def results(self, jaxpr: Any, arguments: Sequence[Axes]) -> tuple[Axes, ...]:
        """The axes along which each result differs, given those of the arguments.

        >>> import jax
        >>> fun = lambda x, y: (x + y, jax.lax.psum(x, "w"), jax.lax.axis_index("w"))
        >>> traced = jax.make_jaxpr(fun, axis_env=[("w", 4)])(1.0, 1.0)
        >>> [sorted(axes) for axes in Dataflow().results(traced, [frozenset({"w"}), NOWHERE])]
        [['w'], [], ['w']]
        """
        question = _plain(jaxpr), tuple(arguments)
        if question not in self._known:
            self._known[question] = self._through(*question)
        return self._known[question]

    def _through(self, jaxpr: Jaxpr, arguments: tuple[Axes, ...]) -> tuple[Axes, ...]:
        found: dict[Any, Axes] = dict(zip(jaxpr.invars, arguments, strict=True))

        def axes_of(atom: Any) -> Axes:
            return NOWHERE if isinstance(atom, Literal) else found.get(atom, NOWHERE)

        for equation in jaxpr.eqns:
            results = self._equation(equation, tuple(axes_of(x) for x in equation.invars))
            found.update(zip(equation.outvars, results, strict=True))
        return tuple(axes_of(x) for x in jaxpr.outvars)

    def _equation(self, equation: JaxprEqn, own: tuple[Axes, ...]) -> tuple[Axes, ...]:
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            return self._cond(params, own)
        if name == "scan":
            return self._scan(equation, own)
        if name == "while":
            return self._while(params, own)
        inside = list(_jaxprs(params))
        somewhere = NOWHERE.union(*own)
        if len(inside) == 1 and _is_call(equation, inside[0], differs=bool(somewhere)):
            return self.results(inside[0], own)
        named = _axes_named(params)
        if named and name in _REDUCE and params.get("axis_index_groups") is None:
            somewhere = somewhere - named
        elif name not in _RETYPE:
            somewhere = somewhere.union(named, *map(axes_inside, inside))
        return (somewhere,) * len(equation.outvars)

    def _cond(self, params: Mapping[str, Any], own: tuple[Axes, ...]) -> tuple[Axes, ...]:
        """If the choice of the branch differs, all results differ."""
        chosen, *operands = own
        branches = [self.results(branch, operands) for branch in params["branches"]]
        return tuple(chosen.union(*axes) for axes in zip(*branches, strict=True))

    def _scan(self, equation: JaxprEqn, own: tuple[Axes, ...]) -> tuple[Axes, ...]:
        """The carry has the same shape inside and outside; JAX versions count it differently."""
        body = _plain(equation.params["jaxpr"])
        carries = _unsliced(equation.outvars, body.outvars)
        last = _unsliced(equation.invars, body.invars)
        first = last - carries
        consts, carry, items = own[:first], own[first:last], own[last:]
        while True:
            results = self.results(body, (*consts, *carry, *items))
            after = _union(carry, results[:carries])
            if after == carry:
                return results
            carry = after

    def _while(self, params: Mapping[str, Any], own: tuple[Axes, ...]) -> tuple[Axes, ...]:
        """If the length of the loop differs, all results differ."""
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        of_cond, of_body, carry = own[:first], own[first:last], own[last:]
        while True:
            (again,) = self.results(params["cond_jaxpr"], (*of_cond, *carry))
            results = self.results(params["body_jaxpr"], (*of_body, *carry))
            after = tuple(axes | again for axes in _union(carry, results))
            if after == carry:
                return carry
            carry = after


def _union(left: Sequence[Axes], right: Sequence[Axes]) -> tuple[Axes, ...]:
    return tuple(a | b for a, b in zip(left, right, strict=True))


def _is_call(equation: JaxprEqn, inside: Jaxpr, *, differs: bool) -> bool:
    """Whether the equation does nothing but call the one function inside it.

    ``jit``, ``checkpoint`` and functions with their own derivatives are such calls. A function with
    its own batching rule is one only if nothing is batched.
    """
    name = equation.primitive.name
    if name == "custom_vmap_call" and differs:
        return False
    pairs = ((equation.invars, inside.invars), (equation.outvars, inside.outvars))
    if any(len(outer) != len(inner) for outer, inner in pairs):
        return False
    return name == "shard_map" or all(
        _look(x.aval) == _look(y.aval)
        for outer, inner in pairs
        for x, y in zip(outer, inner, strict=True)
    )


def _unsliced(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many values a loop passes unchanged to its body, instead of one item per round."""
    return sum(len(x.aval.shape) == len(y.aval.shape) for x, y in zip(outer, inner, strict=True))


def _look(aval: Any) -> Any:
    return getattr(aval, "shape", None), getattr(aval, "dtype", None)


def _plain(jaxpr: Any) -> Jaxpr:
    """A function without the values of its constants, in all versions of JAX."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The functions inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield _plain(item)


def _axes_named(params: Mapping[str, Any]) -> Axes:
    """The axes that a collective names."""
    names: set[str] = set()
    for value in (params.get("axes"), params.get("axis_name")):
        for name in value if isinstance(value, tuple | list) else (value,):
            if isinstance(name, str):
                names.add(name)
    return frozenset(names)


def axes_inside(jaxpr: Jaxpr) -> Axes:
    """All axes that are named anywhere inside a function."""
    names = NOWHERE
    for equation in jaxpr.eqns:
        names |= _axes_named(equation.params)
        names = names.union(*map(axes_inside, _jaxprs(equation.params)))
    return names
