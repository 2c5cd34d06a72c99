"""Every line in the table of Optax wrappers takes the steps of plain Optax.

The lines are read from the page, so that what users copy is what is tested.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| `(.+)` \|$", PAGE, re.MULTILINE))
N = 2
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.25, -1.0])}
GIVEN = {"mask": {"w": True, "b": False}, "labels": {"w": "train", "b": "freeze"}}


def loss(params):
    return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))


def fast(params):
    return getattr(params, "fast", params)


def run(tx, params, extra, copies: int | None = None):
    """Three steps; with ``copies`` the gradients have as many equal rows."""
    state = tx.init(params)
    for _ in range(3):
        value, grad = jax.value_and_grad(loss)(fast(params))
        rows = grad if copies is None else jax.tree.map(lambda g: jnp.stack([g] * copies), grad)
        given = {"value": value, "grad": grad, "value_fn": loss}
        chosen = {name: given[name] for name in extra}
        updates, state = tx.update(rows, state, params, **chosen)
        params = optax.apply_updates(params, updates)
    return fast(params)


# One that keeps a state, one that skips, and one that has parameters of its own.
QUICK = {"MultiSteps", "apply_if_finite", "chain", "contrib.schedule_free", "lookahead"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LINES]
)
def test_a_wrapper_takes_the_steps_of_plain_optax(name: str, standard_promotion) -> None:
    line = LINES[name]
    assert re.search(rf"\b{re.escape(name)}\(", line)
    rule = ef.error_feedback(ef.identity(), axis_name="data")
    lift = lambda tx, **options: ef.simulate(tx, N, "data", **options)  # noqa: E731
    names = {**vars(optax), **GIVEN}
    ours = eval(line, {**names, "rule": rule, "lift": lift})
    plain = eval(line, {**names, "rule": optax.identity(), "lift": lambda tx, **options: tx})
    start = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    extra = {
        "scale_by_backtracking_linesearch": ["value", "grad", "value_fn"],
        "contrib.reduce_on_plateau": ["value"],
    }.get(name, [])
    both = jax.jit(lambda start: (run(plain, start, extra), run(ours, start, extra, copies=N)))
    expected, got = both(start)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
    assert any((np.asarray(expected[leaf]) != np.asarray(PARAMS[leaf])).any() for leaf in PARAMS)


def test_the_table_is_there() -> None:
    assert len(LINES) == 14
