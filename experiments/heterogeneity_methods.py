"""The methods of the heterogeneity study: line style, rule, step, and what each sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ef_optax as ef
from ef_optax import theory
from experiments import study
from experiments.arguments import UsageError, parse_methods
from experiments.expressions import compressor, takes_steps

AXIS = "workers"
ZETA = 16.0  # of CLAG
TOP_1 = ef.top_k(k=1)
Rule = optax.GradientTransformation


class Method(NamedTuple):
    """Line style, rule, and the step of its theory."""

    label: str
    colour: str
    dashes: Any
    chain: Callable[[Any, Any, int, int], tuple[Rule, ...]]  # of rate, key, dimension, workers
    step: Callable[[theory.Smoothness, int], float]  # of the constants, dimension
    random: bool = False


def rate_after(rule: Rule, rate: Any) -> tuple[Rule, ...]:
    """A rule in gradient units."""
    return rule, optax.scale_by_learning_rate(rate)


def random_1(key: Any) -> ef.Compressor:
    """Unbiased: one entry at random, times d."""
    return ef.random_k(k=1, key=key, scaled=True)


def three_point(name: str, dimension: int) -> theory.ThreePoint:
    """The constants of CLAG or of v2."""
    if name == "clag":
        return theory.three_point_constants("clag", alpha=1 / dimension, zeta=ZETA)
    return theory.three_point_constants("v2", alpha=1 / dimension, omega=dimension - 1.0)


def mixture(dimension: int, workers: int) -> theory.EFBVParameters:
    """EF-BV's lambda and nu for one of the d/2 largest entries, drawn independently."""
    codec = ef.comp_k(1, dimension // 2, key=0).codec
    spread = codec.spread((dimension,))
    return theory.ef_bv_parameters(codec.eta((dimension,)), spread, spread / workers)


def ef21_step(constants: theory.Smoothness, dimension: int) -> float:
    """EF21's step for top-1."""
    return theory.ef21_step(constants, 1 / dimension, mean="QM")


DASHED, DOTTED, MIXED = (0, (6, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5))
METHODS = {
    "gd": Method(
        "GD",
        study.BLACK,
        DASHED,
        lambda rate, key, d, n: rate_after(ef.compressed_mean(ef.identity(), axis_name=AXIS), rate),
        lambda constants, d: 1 / constants.L,
    ),
    "top_1": Method(
        "top-1, no memory",
        study.VERMILION,
        DOTTED,
        lambda rate, key, d, n: rate_after(ef.compressed_mean(TOP_1, axis_name=AXIS), rate),
        lambda constants, d: 1 / constants.L,
    ),
    "ef14": Method(
        "EF14",
        study.VERMILION,
        "-",
        lambda rate, key, d, n: rate_after(ef.error_feedback(TOP_1, axis_name=AXIS), rate)[::-1],
        ef21_step,
    ),
    "ef21": Method(
        "EF21",
        study.BLUE,
        "-",
        lambda rate, key, d, n: rate_after(ef.ef21(TOP_1, axis_name=AXIS), rate),
        ef21_step,
    ),
    "econtrol": Method(
        "EControl",
        study.PURPLE,
        "-",
        lambda rate, key, d, n: rate_after(
            ef.econtrol(TOP_1, 1 / d, axis_name=AXIS, init="full"), rate
        ),
        ef21_step,
    ),
    "clag": Method(
        "3PC: CLAG",
        study.SKY,
        DASHED,
        lambda rate, key, d, n: rate_after(
            ef.three_point_compressor("clag", TOP_1, zeta=ZETA, axis_name=AXIS), rate
        ),
        lambda constants, d: theory.three_point_step(constants, three_point("clag", d)),
    ),
    "v2": Method(
        "3PC: v2",
        study.SKY,
        MIXED,
        lambda rate, key, d, n: rate_after(
            ef.three_point_compressor("v2", TOP_1, second=random_1(key), axis_name=AXIS), rate
        ),
        lambda constants, d: theory.three_point_step(constants, three_point("v2", d)),
        random=True,
    ),
    "diana": Method(
        "DIANA",
        study.GREEN,
        "-",
        lambda rate, key, d, n: rate_after(ef.diana(random_1(key), axis_name=AXIS), rate),
        lambda constants, d: theory.diana_step(constants, d - 1.0),
        random=True,
    ),
    "ef_bv": Method(
        "EF-BV",
        study.GREEN,
        DASHED,
        lambda rate, key, d, n: rate_after(
            ef.ef_bv(ef.comp_k(1, d // 2, key=key), *mixture(d, n)[:2], axis_name=AXIS),
            rate,
        ),
        lambda constants, d: theory.ef_bv_step(constants, mixture(d, constants.num_workers)),
        random=True,
    ),
    "marina": Method(
        "MARINA",
        study.ORANGE,
        "-",
        lambda rate, key, d, n: rate_after(
            ef.marina(random_1(key), 1 / d, jax.random.fold_in(key, 1), axis_name=AXIS), rate
        ),
        lambda constants, d: theory.marina_step(constants, d - 1.0, 1 / d),
        random=True,
    ),
}


OTHERS = (study.BLACK, study.PURPLE, study.BLUE, study.ORANGE)
"""Colours of expressions, which are dotted."""


def parse(text: str) -> dict[str, Method]:
    """The methods that --methods names: those above, and expressions of rules.

    An expression is a rule in gradient units, such as `ef21(block_top_k(0.1))`, before the rate. It
    has no theory here, so its step is a multiple of GD's 1/L.
    """
    names = parse_methods(text, list(METHODS))
    others = [name for name in names if name not in METHODS]
    for name in others:
        _check(name)
    return {
        name: METHODS[name] if name in METHODS else _of_expression(name, others.index(name))
        for name in names
    }


def _check(name: str) -> None:
    expression = ef.parse(name)
    try:
        made = expression.build(AXIS)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--methods: {name}: {error}") from None
    if isinstance(made, ef.Compressor) or takes_steps(expression):
        raise UsageError(
            f"--methods: {name} is not a rule alone; write ef21(top_k(0.1)), and the study adds "
            "the rate"
        )


def _of_expression(name: str, index: int) -> Method:
    return Method(
        name,
        OTHERS[index % len(OTHERS)],
        DOTTED,
        lambda rate, key, d, n: rate_after(ef.parse(name).build(AXIS), rate),
        lambda constants, d: 1 / constants.L,
    )


def message_bits(method: str, dimension: int) -> int:
    """One worker's message of an ordinary round, by its codecs."""
    codecs = {
        "gd": [ef.identity()],
        "v2": [random_1(0), TOP_1],
        "diana": [random_1(0)],
        "ef_bv": [ef.comp_k(1, dimension // 2, key=0)],
        "marina": [random_1(0)],
    }
    leaf = jax.ShapeDtypeStruct((dimension,), jnp.float64)
    if method not in METHODS:
        return ef.message_bits(compressor(ef.parse(method)), leaf)
    return sum(ef.message_bits(codec, leaf) for codec in codecs.get(method, [TOP_1]))


def information(method: str, state: Any, first: Any, dimension: int) -> Any:
    """What a worker sent in the round that led to this state, in bits, as the papers count it."""
    ordinary, full = message_bits(method, dimension), 64 * dimension
    if method == "marina":
        return jnp.where(optax.tree.get(state, "exact"), full, ordinary)
    if method == "econtrol":
        return jnp.where(first, full, ordinary)
    if method == "clag":  # of the mean worker; a silent one sends nothing
        return ordinary * jnp.mean(optax.tree.get(state, "sent").astype(float))
    return ordinary
