"""What decides how long the first step takes: equations to trace and lower, kernels to compile.

The tests count and do not time. For each further leaf, a step may cost what Adam itself costs and a
little more. If work that leaves share is done for each leaf again, a count here grows.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks.compile_time import kernels_of
from tests.programs import compiled

pytestmark = pytest.mark.usefixtures("standard_promotion")

N, FEW, MANY = 2, 3, 7
METHODS: dict[str, Callable[[], ef.Compressor]] = {
    "identity": ef.identity,
    "scaled_sign": ef.scaled_sign,
    "top_k": lambda: ef.top_k(0.3),
    "qsgd": lambda: ef.qsgd(7, key=0, bucket=16),
}
ENDS_WITHIN = {  # a block: leaves of other sizes, with zeros between them or in rows
    "qsgd, within": METHODS["qsgd"],
    "block_top_k, within": lambda: ef.block_top_k(0.3, block=16),
}
ROWS = {
    "qsgd": 128,
    "scaled_sign": 32,
}  # of how many values a leaf consists, if it can be part of a vector


def likes(*lead: int, count: int, equal: bool, row: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Equal leaves, or leaves of different shapes: whole rows, or with indices of 6 bits."""
    shapes = [(6, 5) if equal else (33 + i,) if row == 1 else (1 + i, row) for i in range(count)]
    return {str(i): jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for i, s in enumerate(shapes)}


@functools.cache
def traced(method: str, count: int, equal: bool = True) -> jax.stages.Traced:
    """The update of ``count`` leaves; for "dense", Adam on the mean."""
    adam = optax.adam(1e-3)
    row = ROWS.get(method, 1)
    params, grads = (likes(*lead, count=count, equal=equal, row=row) for lead in ((), (N,)))
    if method == "dense":

        def update(grads, state):
            return adam.update(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads), state)

        return jax.jit(update).trace(grads, jax.eval_shape(adam.init, params))
    rule = ef.error_feedback((METHODS | ENDS_WITHIN)[method](), axis_name="data")
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
def kernels(method: str, count: int, equal: bool = True) -> Counter[str]:
    """The kernels of the compiled program, and how often each occurs."""
    return kernels_of(compiled(traced(method, count, equal).lower()).as_text())


def growth(counts: list[int]) -> float:
    """By how much a count grows with each leaf."""
    few, many = counts
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize("method", METHODS)
def test_one_more_leaf_adds_few_equations(method: str) -> None:
    """Besides Adam's: g + e, its row in a stack, the mean and the residual; the choice between old
    and new for the update, two moments and the residual; and joining the leaves for one check. The
    identity is not stacked: each leaf is encoded, decoded and divided by the number of workers."""
    own, dense = (
        growth([equations(traced(name, count).jaxpr) for count in (FEW, MANY)])
        for name in (method, "dense")
    )
    assert own <= dense + (14 if method == "identity" else 10), (own, dense)


def test_explicit_axes_add_no_equation() -> None:
    """Arrays with the specs of their layouts go into the map as they are: nothing is resharded."""
    counts = []
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])
        tx = ef.data_parallel(ef.error_feedback(ef.identity(), axis_name="data"), mesh, "data")
        params, grads = (
            {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
                for name, x in likes(*lead, count=FEW, equal=True).items()
            }
            for lead, spec in (((), P()), ((N,), P("data")))
        )
        traced = jax.jit(tx.update).trace(grads, tx.abstract_state(params), params)
        counts.append(equations(traced.jaxpr))
    assert counts[0] == counts[1], counts


# The others differ within a bundle of leaves only.
FEW_METHODS = [
    pytest.param(m, marks=() if m == "scaled_sign" else pytest.mark.slow) for m in METHODS
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_equal_leaves_share_their_kernels(method: str) -> None:
    """Only the kernels that join the leaves depend on their number."""
    few, many = (kernels(method, count) for count in (FEW, MANY))
    assert len(many) <= len(few) + 2, (len(few), len(many))


@pytest.mark.parametrize("method", FEW_METHODS)
def test_one_more_leaf_adds_few_kernels(method: str) -> None:
    """Besides Adam's: the input, the mean and the residual, and the choice between old and new for
    the update, two moments and the residual. Small leaves share one check for finite numbers.
    """
    own, dense = (
        growth([sum(kernels(name, count).values()) for count in (FEW, MANY)])
        for name in (method, "dense")
    )
    assert own <= dense + 7, (own, dense)


@pytest.mark.parametrize(
    ("method", "more"),
    [(method, 7) for method in ("top_k", "qsgd", "scaled_sign", "block_top_k, within")]
    + [("qsgd, within", 8)],
)
def test_one_more_shape_adds_few_kernels(method: str, more: int) -> None:
    """Leaves of a family are rows of one array, and leaves of whole blocks parts of one vector.
    Besides Adam's, a shape has the input, the mean and the residual in a row, and four choices
    between old and new; nothing is sorted or packed again, and nothing decoded.
    """
    own, dense = (
        growth([len(kernels(name, count, equal=False)) for count in (FEW, MANY)])
        for name in (method, "dense")
    )
    assert own <= dense + more, (own, dense)
