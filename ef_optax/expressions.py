"""Transformations by name: a text such as ``error_feedback(top_k(0.01)) | adamw(3e-4)``.

A text is read into calls of public functions and literals, and nothing is executed: it has no
variables, no operators but ``|`` and the sign of a number, and no names but those of functions that
make compressors, transformations and schedules. Only :meth:`Expression.build` calls them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import optax
import optax.contrib

from ef_optax._exchange.collectives import AxisName
from ef_optax._numeric import check

__all__ = ["Call", "Expression", "parse_list", "vocabulary"]

MOST_CHARACTERS = 10_000

_MODULES = ("exchanges", "policies", "estimators", "local", "recipes")
_MAKES_A_TRANSFORMATION = {
    "optax.GradientTransformation",
    "optax.GradientTransformationExtraArgs",
    optax.GradientTransformation,
    optax.GradientTransformationExtraArgs,
}
_MAKES_AN_ARGUMENT = {"Compressor", "Prox"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a public function.

    Attributes:
      name: the name as it was written.
      function: what it names.
      args: the positional arguments: calls, literals, or tuples and lists of these.
      kwargs: pairs of a keyword and an argument.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        given = [_text(x) for x in self.args] + [f"{k}={_text(x)}" for k, x in self.kwargs]
        return f"{self.name}({', '.join(given)})"

    def build(self, axis_name: AxisName) -> Any:
        """The result of the call; functions of this library get the worker axis."""
        args = [_built(x, axis_name) for x in self.args]
        kwargs = {name: _built(x, axis_name) for name, x in self.kwargs}
        if _takes_axis(self.function):
            kwargs.setdefault("axis_name", axis_name)
        return self.function(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Expression:
    """What a text says, before anything is made of it; ``str`` gives the text in one spelling.

    Attributes:
      parts: the calls between the bars, in the order of the chain.
    """

    parts: tuple[Call, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))

    def calls(self) -> Iterator[Call]:
        """All calls in it, the outer ones before their arguments, in the order of the text."""
        return _calls(self.parts)

    def build(self, axis_name: AxisName = None) -> Any:
        """Makes the compressor, the transformation, or the chain of several.

        Args:
          axis_name: the worker axis, for every rule in it that does not name one.

        Returns:
          What the function of a single part returns, or ``optax.chain`` of the parts.
        """
        check.axis(axis_name)
        made = [part.build(axis_name) for part in self.parts]
        return made[0] if len(made) == 1 else optax.chain(*made)


def parse(text: str, also: Mapping[str, Callable[..., Any]] | None = None) -> Expression:
    """Reads one expression of public names; nothing is executed.

    .. code-block:: text

       expression = call | call "|" expression        a chain; the parts make transformations
       call       = name | name "(" arguments ")"     a name alone is a call without arguments
       argument   = call, number, string, True, False, None, or a tuple or list of arguments

    Names are the functions of ``ef_optax`` and of its modules ``exchanges``, ``policies``,
    ``estimators``, ``local`` and ``recipes`` that make a compressor or a transformation, and the
    optimizers and schedules of Optax. A name may be written with its module (``optax.identity``);
    without it, the name of this library is meant where both have one.

    Args:
      text: the expression.
      also: further functions by name, which make transformations. A name that the library has as
        well means the further function only where it stands alone, without arguments.

    Returns:
      The expression. ``build(axis_name)`` makes the transformation; ``str`` is a text that is read
      as the same expression.

    Raises:
      TypeError: if ``text`` is not a string.
      ValueError: for anything that is no such expression, an unknown name (the message has the
        nearest ones), or arguments that the function does not take.

    Example:
      >>> import ef_optax as ef
      >>> method = ef.parse("error_feedback(top_k(0.01),decay=.9)|adamw(3e-4)")
      >>> print(method)
      error_feedback(top_k(0.01), decay=0.9) | adamw(0.0003)
      >>> tx = ef.simulate(method.build("data"), 8, "data")
    """
    expressions = parse_list(text, also)
    if len(expressions) != 1:
        raise ValueError(
            f"text={_shown(text)} has {len(expressions)} expressions; use "
            "ef_optax.expressions.parse_list for several, and | for a chain."
        )
    return expressions[0]


def parse_list(text: str, also: Mapping[str, Callable[..., Any]] | None = None) -> list[Expression]:
    """Reads expressions that are separated by commas, as :func:`parse` reads one.

    Args:
      text: the expressions.
      also: further functions by name, as for :func:`parse`.

    Returns:
      The expressions, in their order.

    Raises:
      TypeError, ValueError: as for :func:`parse`.

    Example:
      >>> [str(e) for e in parse_list("ef21(top_k(k=3)) | sgd(0.1), adam(1e-3)")]
      ['ef21(top_k(k=3)) | sgd(0.1)', 'adam(0.001)']
    """
    if not isinstance(text, str):
        raise TypeError(f"text={text!r} must be a string.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"text={_shown(text)} has {len(text)} characters; at most {MOST_CHARACTERS} are read."
        )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.Tuple) else [tree]
        return [_Reader(text.strip(), also or {}).expression(node) for node in nodes]
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"text={_shown(text)} is not an expression ({type(error).__name__}); use calls of "
            "public names, such as error_feedback(top_k(0.01)) | adamw(3e-4)."
        ) from None


class _Reader:
    """Turns the syntax tree of a text into calls."""

    def __init__(self, text: str, also: Mapping[str, Callable[..., Any]]) -> None:
        self.text, self.also = text, also

    def expression(self, node: ast.expr) -> Expression:
        parts = [self.call(part) for part in _parts(node)]
        for part in parts:
            if len(parts) > 1 and not self.makes_a_transformation(part):
                raise ValueError(
                    f"text={_shown(self.text)}: {part} makes no transformation, so it cannot be a "
                    f"part of a chain; use a compressor inside a rule: error_feedback({part})."
                )
        return Expression(tuple(parts))

    def call(self, node: ast.expr) -> Call:
        arguments: list[ast.expr] = []
        keywords: list[ast.keyword] = []
        called = node
        if isinstance(node, ast.Call):
            called, arguments, keywords = node.func, node.args, node.keywords
        name = _dotted(called)
        if name is None:
            raise self.error(node, "is not a call of a public name")
        args = tuple(self.argument(x) for x in arguments)
        kwargs = []
        for keyword in keywords:
            if keyword.arg is None:
                raise self.error(keyword.value, "after ** is not allowed")
            kwargs.append((keyword.arg, self.argument(keyword.value)))
        function = self.also[name] if called is node and name in self.also else self.named(name)
        call = Call(name, function, args, tuple(kwargs))
        self.check_arguments(call)
        return call

    def argument(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Tuple | ast.List):
            items = [self.argument(x) for x in node.elts]
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, ast.Constant) and not isinstance(node.value, bytes | type(...)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.argument(node.operand)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number
        if isinstance(node, ast.Call | ast.Name | ast.Attribute):
            return self.call(node)
        raise self.error(node, "is neither a call nor a literal")

    def named(self, name: str) -> Callable[..., Any]:
        names = {**self.also, **vocabulary()}
        if name in names:
            return names[name]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        remedy = f"use {' or '.join(near) or 'a name that help(ef_optax) lists'}."
        raise ValueError(
            f"text={_shown(self.text)}: {name!r} is no public name of ef_optax or Optax that makes "
            f"a compressor, a transformation or a schedule; {remedy}"
        )

    def makes_a_transformation(self, part: Call) -> bool:
        return part.name in self.also or _returns(part.function) in _MAKES_A_TRANSFORMATION

    def check_arguments(self, call: Call) -> None:
        kwargs = dict(call.kwargs)
        if _takes_axis(call.function):
            kwargs.setdefault("axis_name", None)
        signature = inspect.signature(call.function)
        try:
            signature.bind(*call.args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"text={_shown(self.text)}: {call} does not fit {call.name}{_short(signature)}: "
                f"{error}."
            ) from None

    def error(self, node: ast.expr, reason: str) -> ValueError:
        segment = ast.get_source_segment(self.text, node)
        return ValueError(
            f"text={_shown(self.text)}: {segment!r} {reason}; use calls of public names with "
            "numbers, strings and other calls as arguments."
        )


@functools.cache
def vocabulary() -> Mapping[str, Callable[..., Any]]:
    """The functions that an expression may call, by their names with and without the module.

    Example:
      >>> "top_k" in vocabulary(), "optax.adamw" in vocabulary(), "save" in vocabulary()
      (True, True, False)
    """
    # Looked up when it is needed, because the front door imports this file.
    front = importlib.import_module("ef_optax")
    homes = [("ef_optax", front), *((name, getattr(front, name)) for name in _MODULES)]
    names: dict[str, Callable[..., Any]] = {}
    for home, module in homes:
        for name in module.__all__:
            function = getattr(module, name)
            if _returns(function) in _MAKES_A_TRANSFORMATION | _MAKES_AN_ARGUMENT:
                names[name] = names[f"{home}.{name}"] = function
    for home, module in (("optax", optax), ("optax.contrib", optax.contrib)):
        for name, function in _functions(module):
            names[f"{home}.{name}"] = function
            names.setdefault(name, function)
    return names


def _functions(module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions of a module of Optax that make a transformation or a schedule."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        schedule = function.__module__.startswith("optax.schedules._schedule")
        if not name.startswith("_") and (schedule or _returns(function) in _MAKES_A_TRANSFORMATION):
            yield name, function


def _returns(function: Any) -> Any:
    return getattr(function, "__annotations__", {}).get("return")


def _takes_axis(function: Callable[..., Any]) -> bool:
    ours = function.__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours and "axis_name" in inspect.signature(function).parameters


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """The operands of a chain ``a | b | c``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _parts(node.left)
        yield node.right
    else:
        yield node


def _calls(nodes: Iterable[Any]) -> Iterator[Call]:
    for node in nodes:
        if isinstance(node, tuple | list):
            yield from _calls(node)
        elif isinstance(node, Call):
            yield node
            yield from _calls((*node.args, *(value for _, value in node.kwargs)))


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _shown(text: str) -> str:
    """The text as it appears in a message."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _text(x: Any) -> str:
    if isinstance(x, list):
        return f"[{', '.join(map(_text, x))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_text, x))}{',' if len(x) == 1 else ''})"
    return str(x) if isinstance(x, Call) else repr(x)


def _built(x: Any, axis_name: AxisName) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(_built(item, axis_name) for item in x)
    return x.build(axis_name) if isinstance(x, Call) else x


def _short(signature: inspect.Signature) -> str:
    """The parameters without their types."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))
