"""What decides how long the first step takes: equations to trace and lower, kernels to compile.

Counts, not seconds. A tree of more equal leaves may cost what Adam itself costs for them, and a
little: if work on each leaf comes back that was shared before, a count here grows.
"""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest

import ef_optax as ef
from benchmarks.compile_time import kernels_of
from tests.programs import compiled

pytestmark = pytest.mark.usefixtures("standard_promotion")

N, FEW, MANY = 2, 3, 7
METHODS = {
    "identity": ef.identity,
    "scaled_sign": ef.scaled_sign,
    "top_k": lambda: ef.top_k(0.3),
}


def likes(*shape: int, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {str(i): jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(count)}


@functools.cache
def traced(method: str, count: int) -> jax.stages.Traced:
    """The update of so many equal leaves; without a method, Adam on the mean."""
    adam = optax.adam(1e-3)
    params, grads = likes(6, 5, count=count), likes(N, 6, 5, count=count)
    if method == "dense":

        def update(grads, state):
            return adam.update(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads), state)

        return jax.jit(update).trace(grads, jax.eval_shape(adam.init, params))
    rule = ef.error_feedback(METHODS[method](), axis_name="data")
    tx = ef.simulate(optax.chain(rule, adam), N, "data")
    return jax.jit(tx.update).trace(grads, tx.abstract_state(params), params)


def equations(jaxpr, seen: set[int] | None = None) -> int:
    """How many equations a program has; a function that is traced once is counted once."""
    seen = set() if seen is None else seen
    plain = getattr(jaxpr, "jaxpr", jaxpr)
    if id(plain) in seen:
        return 0
    seen.add(id(plain))
    inside = 0
    for equation in plain.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(item, "eqns"):
                    inside += equations(item, seen)
    return len(plain.eqns) + inside


@functools.cache
def kernels(method: str, count: int) -> Counter[str]:
    """The kernels of the compiled program, and how often each stands in it."""
    return kernels_of(compiled(traced(method, count).lower()).as_text())


def growth(counts: list[int]) -> float:
    """By how much a count grows with each leaf."""
    few, many = counts
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize("method", METHODS)
def test_a_leaf_more_is_a_few_equations_more(method: str) -> None:
    """Beside Adam's own: g + e, its row of a stack, the mean and the residual; the choice of
    update, two moments and residual; and to join what is asked together."""
    own, dense = (
        growth([equations(traced(name, count).jaxpr) for count in (FEW, MANY)])
        for name in (method, "dense")
    )
    assert own <= 2 * dense, (own, dense)


@pytest.mark.parametrize("method", METHODS)
def test_equal_leaves_share_their_kernels(method: str) -> None:
    """Only what joins the leaves depends on their number."""
    few, many = (kernels(method, count) for count in (FEW, MANY))
    assert len(many) <= len(few) + 2, (len(few), len(many))


@pytest.mark.parametrize("method", METHODS)
def test_a_leaf_more_is_a_few_kernels_more(method: str) -> None:
    """Beside Adam's own: the input, the mean and the residual, and the choice between old and new
    for update, two moments and residual. Whether all is finite is asked of small leaves together.
    """
    own, dense = (
        growth([sum(kernels(name, count).values()) for count in (FEW, MANY)])
        for name in (method, "dense")
    )
    assert own <= dense + 7, (own, dense)
