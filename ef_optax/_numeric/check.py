"""Checks of the options of public functions.

Every error message begins with the function's name (except for the axis name, which all functions
share) and gives the option, its value and what it must be.

There are two kinds of numbers. A number that decides the program (a size, a ratio, a threshold
inside a codec) must be a Python number. A number that only enters the arithmetic of a rule may also
be an array; its value is not checked if ``optax.inject_hyperparams`` traces it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

# ---------------------------------------------------------------------------- words and counts


def flag(name: str, option: str, value: Any) -> None:
    """Refuses anything but True and False: the string ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {option}={value!r} must be True or False.")


def word(name: str, option: str, value: Any, known: Collection[str]) -> None:
    """Refuses anything but one of the known words."""
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"{name}: {option}={value!r} must be one of {', '.join(known)}.")


def axis(value: Any, option: str = "axis_name") -> None:
    """Refuses anything but the name of an axis, a tuple of different names, or None."""
    names = value if isinstance(value, tuple) else (value,)
    known = names and all(isinstance(name, str) and name for name in names)
    if value is not None and not (known and len(set(names)) == len(names)):
        raise ValueError(
            f"{option}={value!r} must be the name of an axis, a tuple of different names, or None "
            "for one worker."
        )


def transformation(name: str, option: str, value: Any) -> None:
    """Refuses anything but an Optax transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name}: {option}={value!r} must be an Optax transformation such as optax.adamw(3e-4)."
        )


def count(
    name: str,
    option: str,
    value: Any,
    *,
    least: int = 1,
    most: int | None = None,
    optional: bool = False,
) -> None:
    """Refuses anything but a Python integer in a range, or None if it is optional."""
    if optional and value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        what = f"a whole number {span}{' or None' if optional else ''}"
        raise ValueError(f"{name}: {option}={value!r} must be {what}{_not_an_array(value)}.")


# ---------------------------------------------------------------------------- numbers of a program


def ratio(name: str, option: str, value: Any) -> None:
    """Refuses anything but a Python number in (0, 1]."""
    static(name, option, value, lambda x: 0 < x <= 1, "a number in (0, 1], kept / total")


def static(name: str, option: str, value: Any, holds: Callable[[Any], bool], what: str) -> None:
    """Refuses anything but a Python number for which ``holds`` is true."""
    python = is_number(value) and isinstance(value, int | float)
    if not (python and holds(value)):
        raise ValueError(f"{name}: {option}={value!r} must be {what}{_not_an_array(value)}.")


def static_positive(name: str, option: str, value: Any) -> None:
    """Refuses anything but a positive, finite Python number."""
    static(name, option, value, lambda x: 0 < x < math.inf, "a positive number")


def _not_an_array(value: Any) -> str:
    """The end of the message if a number of JAX or NumPy was given, and not one of Python."""
    if isinstance(value, np.generic):
        return f", as a Python number: {value.item()!r}"
    if not isinstance(value, jax.Array):
        return ""
    return ", as a Python number; under optax.inject_hyperparams name it in static_args"


# ---------------------------------------------------------------------------- numbers of a rule


def decay(name: str, option: str, value: Any) -> None:
    """Refuses a factor outside [0, 1)."""
    number(name, option, value, lambda x: 0 <= x < 1, "a number in [0, 1)")


def weight(name: str, option: str, value: Any, *, schedule: bool = False) -> None:
    """Refuses a weight outside (0, 1], and a function unless it may be a schedule."""
    if not (schedule and callable(value)):
        number(name, option, value, lambda x: 0 < x <= 1, "a number in (0, 1]")


def share(name: str, option: str, value: Any) -> None:
    """Refuses a share outside [0, 1]."""
    number(name, option, value, lambda x: 0 <= x <= 1, "a number in [0, 1], 1 for all")


def positive(name: str, option: str, value: Any) -> None:
    """Refuses a number that is not above zero."""
    number(name, option, value, lambda x: x > 0, "a positive number")


def not_negative(name: str, option: str, value: Any) -> None:
    """Refuses a number below zero."""
    number(name, option, value, lambda x: x >= 0, "a number of at least 0")


def finite(name: str, option: str, value: Any) -> None:
    """Refuses a number that is not finite."""
    number(name, option, value, lambda x: abs(x) < math.inf, "a finite number")


def rate(name: str, option: str, value: Any, *, optional: bool = False) -> None:
    """Refuses anything but a learning rate: a number of at least 0, or a schedule of the step."""
    if callable(value) or (optional and value is None):
        return
    other = ", or None" if optional else ""
    what = f"a number of at least 0 or a schedule (a function of the step){other}"
    number(name, option, value, lambda x: x >= 0, what)


def number(name: str, option: str, value: Any, holds: Callable[[Any], bool], what: str) -> None:
    """Refuses anything but a number in range; a traced number passes, as its value is unknown."""
    if isinstance(value, Tracer):
        return
    if not (is_number(value) and holds(value)):
        raise ValueError(f"{name}: {option}={value!r} must be {what}.")


def is_number(value: Any) -> bool:
    """Whether this is a Python number or a numeric array without axes; True and False are not.

    >>> is_number(1.5), is_number(jnp.float32(2)), is_number(True), is_number("2")
    (True, True, False, False)
    """
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return jnp.issubdtype(dtype, jnp.number) and jnp.ndim(value) == 0
