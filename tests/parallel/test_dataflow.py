"""The equations of a trace say what differs between workers, as ``vmap`` over the axis does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ef_optax.parallel.dataflow import NOWHERE, Dataflow

W = "w"


@jax.custom_vjp
def with_derivative(x, y):
    return x + 1, y * 2


with_derivative.defvjp(lambda x, y: (with_derivative(x, y), None), lambda _, g: g)


@jax.custom_jvp
def with_tangent(x):
    return x * 2


with_tangent.defjvps(lambda t, out, x: 2 * t)


@jax.custom_batching.custom_vmap
def with_rule(x, y):
    return x, y


@with_rule.def_vmap
def _(size, batched, x, y):
    whole = [
        a if b else jnp.broadcast_to(a, (size, *a.shape))
        for a, b in zip((x, y), batched, strict=True)
    ]
    return tuple(whole), (True, True)


def index(axis):
    return lax.axis_index(axis).astype(jnp.float32)


def fori(x, y):
    return lax.fori_loop(0, 3, lambda _, c: (c[1], c[2], c[2]), (y, y, x))


def scan(x, y):
    return lax.scan(lambda c, item: ((c[1], item), c[0]), (y, y), jnp.stack([x, x, x]))


def until(limit, y):
    return lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1]), (y, y))


# name -> a function of one value that differs and one that does not
FUNCTIONS = {
    "arithmetic": lambda x, y: (x + y, y * 2, jnp.zeros_like(x), 1.0),
    "index": lambda x, y: (lax.axis_index(W), y * index(W)),
    "reductions": lambda x, y: (lax.psum(x, W), lax.pmax(x, W), lax.pmin(x, W), lax.pmean(x, W)),
    "gather": lambda x, y: (lax.all_gather(x, W), lax.all_gather(x, W)[0] + x),
    "all to all": lambda x, y: (lax.all_to_all(jnp.stack([x] * 4), W, 0, 0), y),
    "permute": lambda x, y: (lax.ppermute(x, W, [(0, 1), (1, 0), (2, 3), (3, 2)]), y),
    "scatter": lambda x, y: lax.psum_scatter(jnp.stack([x] * 4), W),
    "jit": jax.jit(lambda x, y: (x, y, lax.psum(x, W) + y)),
    "checkpoint": jax.checkpoint(lambda x, y: (x, y, lax.psum(x, W))),
    "derivative of its own": with_derivative,
    "tangent of its own": lambda x, y: (with_tangent(x), with_tangent(y)),
    "batching of its own": lambda x, y: (with_rule(x, y), with_rule(y, y)),
    "agreed condition": lambda x, y: lax.cond(y > 0, lambda: (x, y), lambda: (y, y)),
    "condition that differs": lambda x, y: lax.cond(x > 0, lambda: (y, 1.0), lambda: (y, 2.0)),
    "collective under a condition": lambda x, y: (
        lax.cond(y > 0, lambda: lax.psum(x, W), lambda: y),
        lax.cond(x > 0, lambda: lax.psum(x, W), lambda: y),
    ),
    "loop that carries it on": fori,
    "loop over it": scan,
    "loop whose length differs": until,
    "loop whose length is agreed": lambda x, y: until(y, y),
    "reduced before the loop": lambda x, y: until(lax.pmax(x, W), y),
    "sort": lambda x, y: lax.sort((jnp.stack([x, y]), jnp.arange(2)), num_keys=1),
    "solve": lambda x, y: (
        jnp.linalg.solve(jnp.eye(2) * x, jnp.ones(2)),
        jnp.linalg.solve(jnp.eye(2) * y, jnp.ones(2)),
    ),
    "random": lambda x, y: (
        jax.random.normal(jax.random.fold_in(jax.random.key(0), lax.axis_index(W))),
        jax.random.normal(jax.random.key(0)),
    ),
}


def by_vmap(fun, x, y):
    """Which results are batched under ``vmap``, seen by an identity with a batching rule."""
    seen = []

    @jax.custom_batching.custom_vmap
    def tap(tree):
        return tree

    @tap.def_vmap
    def _(size, batched, tree):
        del size
        seen.append(batched[0])
        return tree, batched[0]

    def one(x, y):
        tree = jax.tree.map(jnp.asarray, fun(x, y))
        seen.append(jax.tree.map(lambda _: False, tree))
        tap(tree)
        return 0

    mapped = jax.vmap(one, (0, None), None, axis_name=W, axis_size=4)
    jax.eval_shape(mapped, jnp.stack([x] * 4), y)
    return [any(flags) for flags in zip(*(jax.tree.leaves(tree) for tree in seen), strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_equations_say_what_vmap_finds(name: str) -> None:
    fun, x, y = FUNCTIONS[name], jnp.float32(1.0), jnp.float32(2.0)
    traced = jax.make_jaxpr(fun, axis_env=[(W, 4)])(x, y)
    found = Dataflow().results(traced, [frozenset({W}), NOWHERE])
    assert [bool(axes) for axes in found] == by_vmap(fun, x, y)


def test_each_axis_is_followed_on_its_own() -> None:
    def fun(x):
        inside = lax.psum(x, "data")
        return (
            x,
            inside,
            lax.psum(inside, "pod"),
            lax.psum(x, ("pod", "data")) + index("pod"),
        )

    traced = jax.make_jaxpr(fun, axis_env=[("pod", 2), ("data", 3)])(1.0)
    found = Dataflow().results(traced, [frozenset({"pod", "data"})])
    assert [sorted(axes) for axes in found] == [["data", "pod"], ["pod"], [], ["pod"]]


def test_sums_over_groups_of_workers_stay_different() -> None:
    fun = lambda x: lax.psum(x, W, axis_index_groups=[[0, 1], [2, 3]])  # noqa: E731
    traced = jax.make_jaxpr(fun, axis_env=[(W, 4)])(1.0)
    assert Dataflow().results(traced, [frozenset({W})]) == (frozenset({W}),)
