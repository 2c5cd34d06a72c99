"""Messages one step late: the recurrence, the dependencies in the compiled program, the state."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import ef_optax as ef

N, D, RATE, STEPS = 4, 6, 0.1, 6
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
delayed = ef.exchanges.delayed


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    return np.where(np.isin(np.arange(x.size), kept), x, 0)


def transformation() -> optax.GradientTransformation:
    rule = ef.error_feedback(delayed(ef.top_k(k=2)), axis_name="data")
    return optax.chain(rule, optax.sgd(RATE))


def lifted(where: str):
    if where == "simulate":
        return ef.simulate(transformation(), N, "data")
    kinds, devices = (KINDS[where],), jax.devices()[:N]
    mesh = jax.make_mesh((N,), ("data",), axis_types=kinds, devices=devices)
    return ef.data_parallel(transformation(), mesh, "data")


def gradients() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((STEPS, N, D)).astype(np.float32)


@pytest.mark.parametrize(
    "where", ["simulate", *(pytest.param(w, marks=pytest.mark.slow) for w in ("auto", "explicit"))]
)
def test_the_mean_of_the_step_before_is_applied(where: str) -> None:
    """Against NumPy, with the virtual iterate, and a bad step after which nothing is lost."""
    tx, x = lifted(where), np.zeros(D)
    e, waiting = np.zeros((N, D)), np.zeros((N, D))
    params = np.zeros(D, np.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    virtual = np.zeros(D)
    for t, g in enumerate(gradients()):
        if t == 3:
            bad = g.copy()
            bad[1, 2] = np.nan
            updates, state = jax.block_until_ready(update(bad, state, params))
            assert not np.any(updates)
        updates, state = jax.block_until_ready(update(g, state, params))
        params = params + np.asarray(updates)
        x = x - RATE * waiting.mean(0)
        p = g + e
        waiting = np.stack([top(row, 2) for row in p])
        e = p - waiting
        virtual = virtual - RATE * g.mean(0)
        np.testing.assert_allclose(params, x, atol=1e-6)
        np.testing.assert_allclose(state[0].residual, e, atol=1e-6)
        on_its_way = np.asarray(state[0].exchange.codec.of_workers())
        np.testing.assert_allclose(on_its_way, waiting, atol=1e-6)
        left = np.asarray(state[0].residual).mean(0) + on_its_way.mean(0)
        np.testing.assert_allclose(params - RATE * left, virtual, atol=1e-5)


########################################################################################
# What waits for what, in the compiled program
########################################################################################


def operands(text: str) -> dict[str, set[str]]:
    """Every value of an entry computation, and the values that it is computed from."""
    found = {}
    for line in text.splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*?[\w\-]+\((.*)$", line)
        if match:
            names = re.findall(r"%([\w.\-]+)", match[2])
            found[match[1]] = set(names)
    return found


def needed(graph: dict[str, set[str]], name: str) -> set[str]:
    """Everything that must be there before this value is."""
    seen, queue = set(), [name]
    while queue:
        for other in graph.get(queue.pop(), ()):
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return seen


def program(compressor: ef.Compressor, mesh) -> tuple[dict[str, set[str]], str, str, list[str]]:
    """Of one worker's step: the graph, the gather, the gradient's name, and the results'."""
    rule = ef.error_feedback(compressor, axis_name="data")
    flags = ef.parallel.worker_axes(rule, jnp.zeros((8, 8)), "data", N)
    specs = jax.tree.map(lambda own: jax.P("data") if own else jax.P(), flags)

    def one(gradient, state):
        row = jax.tree.map(lambda x, own: x[0] if own else x, state, flags)
        updates, after = rule.update(gradient[0], row)
        made = jax.tree.map(lambda x: x[None], (after.residual, after.exchange.codec))
        return updates, made

    state = ef.simulate(rule, N, "data").init(jnp.zeros((8, 8)))
    step = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(jax.P("data"), specs),
        out_specs=(jax.P(), jax.P("data")),
        check_vma=False,
    )
    text = jax.jit(step).lower(jnp.zeros((N, 8, 8)), state).compile().as_text()
    text = text[text.index("ENTRY ") :]
    graph = operands(text)
    (gather,) = re.findall(r"%([\w.\-]+) = \S+ all-gather\(", text)
    (gradient,) = re.findall(r"%([\w.\-]+) = f32\[1,8,8\][^=]* parameter\(0\)", text)
    (root,) = re.findall(r"ROOT .* tuple\((.*)\)", text)
    results = re.findall(r"%([\w.\-]+)", root)
    return graph, gather, gradient, results


def test_the_transfer_needs_only_the_state_and_the_residual_needs_no_transfer(mesh4) -> None:
    graph, gather, gradient, results = program(delayed(ef.top_k(k=3)), mesh4)
    assert gradient not in needed(graph, gather)
    count = len(jax.tree.leaves(delayed(ef.top_k(k=3)).codec.init(jnp.zeros((8, 8)), "w", N)))
    updates, residual, *message = results[: 2 + count - 1]
    assert gather in needed(graph, updates)
    for made in (residual, *message):
        assert gather not in needed(graph, made) and gradient in needed(graph, made)
    # Without the delay the transfer waits for the gradient.
    graph, gather, gradient, _ = program(ef.top_k(k=3), mesh4)
    assert gradient in needed(graph, gather)


########################################################################################
# The state
########################################################################################


def after_steps(n: int, steps: int = 3):
    tx, params = ef.simulate(transformation(), n, "data"), jnp.zeros(D)
    state, update = tx.init(params), jax.jit(tx.update)
    rng = np.random.default_rng(n)
    for _ in range(steps):
        _, state = update(rng.standard_normal((n, D)).astype(np.float32), state, params)
    return state


@pytest.mark.parametrize(("n", "m"), [(4, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_workers_keeps_what_is_on_its_way(n: int, m: int) -> None:
    old = after_steps(n)
    fresh = lambda n: ef.simulate(transformation(), n, "data").init(jnp.zeros(D))  # noqa: E731
    new = ef.parallel.change_workers(old, fresh(m))
    waiting = np.asarray(old[0].exchange.codec.of_workers())
    assert np.abs(waiting).sum(1).all()
    kept = np.asarray(old[0].residual).mean(0) + waiting.mean(0)
    np.testing.assert_allclose(np.asarray(new[0].residual).mean(0), kept, atol=1e-6)
    assert not new[0].exchange.codec.sent and int(new[0].exchange.step) == 3
    same = ef.parallel.change_workers(old, fresh(n))
    jax.tree.map(np.testing.assert_array_equal, same, old)


def test_weighted_messages_are_refused() -> None:
    exchange = ef.extend.Exchange(delayed(ef.top_k(k=1)).codec, "data")
    one = lambda x: exchange(x, exchange.init(x), weight=1.0).aggregate  # noqa: E731
    with pytest.raises(ValueError, match="the step before .exchanges.delayed. carries no weight"):
        jax.vmap(one, axis_name="data")(jnp.ones((2, 3)))
