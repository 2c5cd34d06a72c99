"""With double precision enabled, no number that a user gives is rounded to float32 on its way.

Every function with a number among its options is traced twice, with two values of each option that
differ. A constant of the trace that differs as well comes from an option; it must not be narrower
than the arrays, and neither must what is computed from such constants alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal

import ef_optax as ef
from tests.project.test_options import ALSO, FUNCTIONS, GIVEN, OPTIONS, call

NEARBY = 1 - 1e-5
"""Factor between the two values: counts that are computed from them are equal."""

EXAMPLES = {
    "clip_norm": 3.0,
    "clip_sigmas": 2.5,
    "decay": 0.5,
    "injection": 0.5,
    "mixing": 0.5,
    "nu": 0.5,
    "sparsity": 1.5,
    "step": 0.5,
    "tolerance": 0.5,
    "weight_decay": 0.5,
}
"""Values of options without a default that is a number."""

STATIC = ("capacity", "error_bound", "fraction", "min_compression", "nonzero", "ratio", "sample")
"""Options that only decide shapes, and powers of two."""

ON_THE_HOST = ("accordion", "with_contraction")
"""Functions that compare arrays before a run, and return a compressor."""

EXTRA = {
    "safe_ef": {"constraint": jnp.ones(()), "constraint_grads": jnp.ones((4, 6))},
    "variance_based": {"squares": jnp.ones((4, 6))},
}

COMPARED = ("ef21_partial_participation probability", "hold_contraction alpha")
"""Options that are only compared with float32 numbers: draws of 24 bits, a measured contraction."""

OPTAX_ONLY = (("muloco", "learning_rate"),)
"""Options that go to Optax's Muon and nowhere else; strict promotion refuses Muon."""

CASES = [
    (name, option)
    for name, option, kind, _ in OPTIONS
    if kind in ("float", "rate")
    and option not in STATIC
    and (name, option) not in OPTAX_ONLY
    and not name.startswith(("theory.", *ON_THE_HOST))
]
CASES += [("ef21_w", "weights"), ("probabilistic_mix", "probabilities")]
CASES += [("ef21_partial_participation", "probability")]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def parameters_of(name: str) -> Any:
    return inspect.signature(FUNCTIONS[name]).parameters


def values_of(name: str, option: str) -> tuple[Any, Any]:
    """Two values of an option that differ by less than counts show."""
    value = value_of(name, option)
    if isinstance(value, float):
        return value, value * NEARBY
    first, second = value
    return value, (first * NEARBY, second + first - first * NEARBY)


def value_of(name: str, option: str) -> Any:
    default = parameters_of(name)[option].default
    own = ALSO.get(name, {}) | ALSO.get(f"{name} {option}", {})
    for value in (EXAMPLES.get(option), own.get(option), GIVEN.get(option), default):
        if isinstance(value, float | tuple):
            return value
    raise AssertionError(f"give an example of {name}({option}=) in EXAMPLES")


def together() -> dict[str, list[str]]:
    """The options of a function that may be varied at once: those that need no other argument."""
    found: dict[str, list[str]] = {}
    for name, option in CASES:
        if not {f"{name} {option}"} & {*ALSO, *COMPARED}:
            found.setdefault(name, []).append(option)
    return {name: options for name, options in found.items() if len(options) > 1}


TOGETHER = together()


def traces(name: str, values: dict[str, Any]) -> list[Any]:
    """The traces of what the function makes, for float64 arrays."""
    (option, value), *more = values.items()
    x = jnp.ones((4, 6))
    if name == "gradient_mapping":
        prox = lambda x, step: x * (1 - step)  # noqa: E731
        return [jax.make_jaxpr(lambda x, g: ef.gradient_mapping(prox, x, g, value))(x, x)]
    worker = {"axis_name": "data"} if "axis_name" in parameters_of(name) else {}
    made = call(name, option, value, **dict(more), **worker)
    if name == "l1_prox":
        return [jax.make_jaxpr(made)(x, x[0, 0])]
    if not isinstance(made, optax.GradientTransformation):
        return [jax.make_jaxpr(made)(x)]
    env = {"axis_env": [("data", 2)]}
    begin, state = jax.make_jaxpr(made.init, return_shape=True, **env)(x)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    points = ef.query_points(zeros, x)
    extra = jax.tree.map(lambda leaf: leaf.astype(float), EXTRA.get(name, {}))
    if len(points) > 1:
        extra["grads"] = dict.fromkeys(points, x)
    update = optax.with_extra_args_support(made).update
    given = (x, state, x, extra)
    step = jax.make_jaxpr(lambda g, s, p, more: update(g, s, p, **more), **env)(*given)
    return [begin, step]


class Narrowed:
    """Finds what comes from constants that differ between two traces and is not float64.

    A value is None if it depends on arguments; otherwise it is whether it differs.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.differs = False

    def compare(self, pair: Any, arguments: list[bool | None]) -> list[bool | None]:
        one, two = (getattr(x, "jaxpr", x) for x in pair)
        known: dict[Any, bool | None] = dict(zip(one.invars, arguments, strict=True))
        constants = zip(*(getattr(x, "consts", ()) for x in pair), strict=True)
        for variable, (a, b) in zip(one.constvars, constants, strict=True):
            known[variable] = self.noted(unequal(a, b), variable.aval, "a constant")

        def status(a: Any, b: Any) -> bool | None:
            if isinstance(a, Literal):
                return self.noted(unequal(a.val, b.val), a.aval, f"{a.val}")
            return known[a]

        assert len(one.eqns) == len(two.eqns)
        for first, second in zip(one.eqns, two.eqns, strict=True):
            assert first.primitive is second.primitive
            given = [status(a, b) for a, b in zip(first.invars, second.invars, strict=True)]
            for variable, own in zip(
                first.outvars, self.through(first, second, given), strict=True
            ):
                known[variable] = self.noted(own, variable.aval, first.primitive.name)
        return [status(a, b) for a, b in zip(one.outvars, two.outvars, strict=True)]

    def through(self, first: Any, second: Any, given: list[bool | None]) -> list[bool | None]:
        data = None in given or first.primitive.name == "axis_index"
        results: list[bool | None] = [None if data else any(given)] * len(first.outvars)
        for name, inner in first.params.items():
            several = isinstance(inner, tuple | list)
            pairs = (
                list(zip(inner, second.params[name], strict=True))
                if several
                else ([(inner, second.params[name])])
            )
            for pair in pairs:
                if not hasattr(getattr(pair[0], "jaxpr", pair[0]), "eqns"):
                    continue
                count = len(getattr(pair[0], "jaxpr", pair[0]).invars)
                own = given[-count:] if 0 < count <= len(given) else [None] * count
                found = self.compare(pair, own)
                if len(found) == len(results) and first.primitive.name in ("jit", "pjit"):
                    results = found
        return results

    def noted(self, differs: bool | None, aval: Any, what: str) -> bool | None:
        self.differs |= bool(differs)
        narrow = jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype.itemsize < 8
        if differs and narrow:
            self.found.append(f"{what} is {aval.dtype}")
        return differs


def unequal(a: Any, b: Any) -> bool:
    if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return not np.array_equal(a, b, equal_nan=jnp.issubdtype(jnp.result_type(a), jnp.floating))


def compared(name: str, options: list[str]) -> list[str]:
    """What is narrower than float64 of all that comes from these options."""
    narrowed = Narrowed()
    both = {option: values_of(name, option) for option in options}
    made = (traces(name, {option: pair[i] for option, pair in both.items()}) for i in range(2))
    for pair in zip(*made, strict=True):
        narrowed.compare(pair, [None] * len(pair[0].jaxpr.invars))
    assert narrowed.differs, "no option is seen"
    return narrowed.found


@pytest.mark.parametrize("name", TOGETHER)
def test_all_numbers_stay_double(name: str) -> None:
    assert not compared(name, TOGETHER[name])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(
            name,
            option,
            id=f"{name} {option}",
            marks=pytest.mark.slow if option in TOGETHER.get(name, ()) else (),
        )
        for name, option in CASES
    ],
)
def test_a_number_stays_double(name: str, option: str) -> None:
    """One option alone, which has to be seen."""
    assert bool(compared(name, [option])) == (f"{name} {option}" in COMPARED)
