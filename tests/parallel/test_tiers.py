"""Tiers: one feedback inside each pod, the next between the pods."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import ef_optax as ef
from ef_optax._exchange.rounds import HEADER_WORDS

D, STEPS = 6, 5
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def top(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    out = np.zeros_like(x)
    out[kept] = x[kept]
    return out


def oracle(grads: np.ndarray, shape: tuple[int, ...], ks: tuple[int, ...], rate: float):
    """The parameters and the residual of every tier, as (workers, D).

    ``shape`` is that of the mesh, whose last axis is averaged first; ``ks`` are the k of the tiers
    in the order in which they average.
    """
    x = np.zeros(D)
    residuals = [np.zeros((*shape[: len(shape) - i], D)) for i in range(len(ks))]
    for g in grads:
        arriving = g.reshape(*shape, D)
        for e, k in zip(residuals, ks, strict=True):
            p = arriving + e
            sent = np.stack([top(row, k) for row in p.reshape(-1, D)]).reshape(p.shape)
            e[...] = p - sent
            arriving = sent.mean(-2)
        x = x - rate * arriving
    whole = [
        np.broadcast_to(e.reshape(*e.shape[:-1], *[1] * i, D), (*shape, D)).reshape(-1, D)
        for i, e in enumerate(residuals)
    ]
    return x, whole


CASES = {
    "two": ((2, 2), ("pod", "data"), (3, 1)),
    "three": ((2, 3, 2), ("site", "pod", "data"), (4, 2, 1)),
}


def lifted(where: str, tiers: str, rate: float):
    shape, axes, ks = CASES[tiers]
    pairs = [(axis, ef.top_k(k=k)) for axis, k in zip(reversed(axes), ks, strict=True)]
    tx = optax.chain(ef.hierarchical(pairs), optax.sgd(rate))
    if where == "simulate":
        return ef.simulate(tx, shape, axes)
    kinds, devices = (KINDS[where],) * len(shape), jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)
    return ef.data_parallel(tx, mesh, axes)


@pytest.mark.parametrize(
    ("where", "tiers"),
    [
        ("simulate", "three"),
        ("auto", "two"),
        pytest.param("simulate", "two", marks=pytest.mark.slow),
        pytest.param("explicit", "two", marks=pytest.mark.slow),
    ],
)
def test_tiers_follow_the_oracle_and_skip_together(where: str, tiers: str) -> None:
    shape, _, ks = CASES[tiers]
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((STEPS, math.prod(shape), D)).astype(np.float32)
    tx = lifted(where, tiers, 0.5)
    params = jnp.zeros(D)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i, g in enumerate(grads):
        for value in (np.nan, 3e30) if i == 2 else ():  # of one worker of the first pod
            bad = grads[0].copy()
            bad[1, 2] = value
            updates, state = update(bad, state, params)
            assert (np.asarray(updates) == 0).all()
        updates, state = update(g, state, params)
        params = np.asarray(optax.apply_updates(params, updates))
    x, residuals = oracle(grads.astype(np.float64), shape, ks, 0.5)
    np.testing.assert_allclose(params, x, atol=1e-5)
    for tier, expected in zip(state[0], residuals, strict=True):
        np.testing.assert_allclose(tier.residual, expected, atol=1e-5)


def test_each_tier_differs_over_its_own_axes() -> None:
    shape, axes, _ = CASES["two"]
    tx = ef.hierarchical([("data", ef.top_k(k=3)), ("pod", ef.top_k(k=1))])
    flags = ef.parallel.worker_axes(tx, jnp.zeros(D), axes, shape)
    assert (flags[0].residual, flags[1].residual) == (True, True)


def test_between_tiers_nothing_is_rounded_to_the_gradients_dtype() -> None:
    """A chain of rules hands bfloat16 to the second tier; in one call the mean of a pod is whole.

    The workers of a pod have 1 and 1 + 2^-7, whose mean 1 + 2^-8 is not a bfloat16 number.
    """
    tiers = [("data", ef.identity()), ("pod", ef.top_k(k=1))]
    rules = [ef.error_feedback(compressor, axis_name=axis) for axis, compressor in tiers]
    grads = jnp.asarray([[2.0, 1.0], [2.0, 1.0078125]], jnp.bfloat16)
    for tx, kept in ((ef.hierarchical(tiers), 1.00390625), (optax.chain(*rules), 1.0)):

        def one(g, tx=tx):
            updates, state = tx.update(g, tx.init(g))
            return updates, state[1].residual

        inside = jax.vmap(one, axis_name="data", out_axes=None)
        run = jax.jit(jax.vmap(inside, axis_name="pod", out_axes=(None, 0)))
        updates, residual = run(grads[None])
        assert updates.dtype == jnp.bfloat16 and updates.tolist() == [2.0, 0.0]
        assert residual.tolist() == [[0.0, kept]]


def test_two_rules_in_one_chain_are_two_tiers() -> None:
    """The lift gives each rule the axes over which its residual differs; worked out by hand."""
    rules = [ef.error_feedback(ef.top_k(k=1), axis_name=axis) for axis in ("data", "pod")]
    tx = ef.simulate(optax.chain(*rules), (2, 2), ("pod", "data"))
    grads = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 4.0], [0.0, 0.0, 4.0]])
    updates, (first, second) = jax.jit(tx.update)(grads, tx.init(jnp.zeros(3)), jnp.zeros(3))
    assert updates.tolist() == [0.75, 0.0, 2.0]  # of the pods' [1.5, 1, 0] and [0, 0, 4]
    assert first.residual.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert second.residual.tolist() == [[0.0, 1.0, 0.0]] * 2 + [[0.0] * 3] * 2


SLOW, FAST, SHAPE = 2, 4, (16, 12)
FEW = ef.natural(3)
FEWER = ef.block_top_k(0.1, block=64)


@functools.cache
def compiled(kind: str):
    axes = ("dcn", "ici")
    mesh = jax.make_mesh((SLOW, FAST), axes, axis_types=(KINDS[kind],) * 2)
    tx = ef.data_parallel(ef.hierarchical([("ici", FEW), ("dcn", FEWER)]), mesh, axes)
    params = jnp.zeros(SHAPE)
    grads = jax.ShapeDtypeStruct((SLOW * FAST, *SHAPE), jnp.float32)
    with jax.set_mesh(mesh):
        return jax.jit(tx.update).lower(grads, tx.init(params), params).compile()


@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_every_message_crosses_its_own_axis_only(kind: str) -> None:
    """Read from the compiled update: over each axis one gather, of exactly its tier's bits."""
    report = ef.wire_report(compiled(kind))
    for size, compressor in ((FAST, FEW), (SLOW, FEWER)):
        (gather,) = report.over(size).collectives
        words = HEADER_WORDS + math.ceil(compressor.bits(SHAPE) / 32)
        assert (gather.kind, gather.message_bytes) == ("gather", 4 * words)
    (flag,) = report.over(SLOW * FAST).collectives  # whether all workers keep the step
    assert (flag.kind, flag.message_bytes) == ("reduce", 4)


@pytest.mark.parametrize(
    ("tiers", "error", "words"),
    [
        ([], ValueError, "tiers=.. must be a list"),
        ([ef.top_k(k=1)], ValueError, "must be a list of .axis_name, compressor."),
        ([("a", ef.top_k(k=1)), (("b", "a"), ef.top_k(k=1))], ValueError, "no tier before it"),
        ([(None, ef.top_k(k=1))], ValueError, "axis_name=None of tiers.0. must be an axis"),
        ([("a", ef.top_k)], TypeError, "hierarchical: compressor of tiers.0.=top_k is a function"),
        ([(3, ef.top_k(k=1))], ValueError, "axis_name of tiers.0.=3 must be"),
    ],
)
def test_what_is_no_list_of_tiers_is_refused(tiers, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ef.hierarchical(tiers)
