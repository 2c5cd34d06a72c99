"""Every rule in a checked ``shard_map``: what its types say, and the same numbers as simulated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import ef_optax as ef

N, AXIS = 4, "data"
TOP, SIGN = ef.top_k(k=2), ef.scaled_sign()
UNBIASED = ef.random_k(key=5, k=2, scaled=True)
WEIGHTS = (0.125, 0.125, 0.25, 0.5)

RULES = {
    "adacomp": lambda: ef.adacomp(2, axis_name=AXIS),
    "clip21": lambda: ef.clip21(0.5, axis_name=AXIS),
    "dgc": lambda: ef.dgc(TOP, nesterov=True, clip_norm=1.0, axis_name=AXIS),
    "diana": lambda: ef.diana(UNBIASED, axis_name=AXIS),
    "dist_ef_sgdm": lambda: ef.dist_ef_sgdm(SIGN, 0.1, axis_name=AXIS),
    "double_squeeze": lambda: ef.double_squeeze(TOP, SIGN, axis_name=AXIS),
    "ec_sgd_diana": lambda: ef.ec_sgd_diana(TOP, UNBIASED, 0.5, axis_name=AXIS),
    "dgc scheduled": lambda: ef.dgc(ef.scheduled([1], [ef.identity(), TOP]), axis_name=AXIS),
    "econtrol": lambda: ef.econtrol(TOP, 0.1, axis_name=AXIS, init="full"),
    "ecq_sgd": lambda: ef.ecq_sgd(TOP, 0.5, 0.9, axis_name=AXIS),
    "ef21": lambda: ef.ef21(TOP, axis_name=AXIS, init="full"),
    "ef21 zero": lambda: ef.ef21(SIGN, axis_name=AXIS, init="zero"),
    "ef21_bidirectional": lambda: ef.ef21_bidirectional(TOP, SIGN, axis_name=AXIS),
    "ef21_double_momentum": lambda: ef.ef21_double_momentum(TOP, 0.5, axis_name=AXIS),
    "ef21_heavy_ball": lambda: ef.ef21_heavy_ball(TOP, 0.5, axis_name=AXIS),
    "ef21_partial_participation": lambda: ef.ef21_partial_participation(
        TOP, 0.5, 3, weights=WEIGHTS, axis_name=AXIS
    ),
    "ef21_plus": lambda: ef.ef21_plus(TOP, axis_name=AXIS, init="full"),
    "ef21_w": lambda: ef.ef21_w(SIGN, WEIGHTS, axis_name=AXIS),
    "ef_bv": lambda: ef.ef_bv(UNBIASED, 0.3, 0.8, axis_name=AXIS),
    "ef_momentum": lambda: ef.ef_momentum(TOP, 0.5, axis_name=AXIS),
    "fcc": lambda: ef.error_feedback(ef.fcc(SIGN, 2), axis_name=AXIS),
    "two_shot": lambda: ef.error_feedback(ef.two_shot(SIGN, axis_name=AXIS), axis_name=AXIS),
    "scalecom": lambda: ef.scalecom(k=2, beta=0.5, axis_name=AXIS),
    "three_point clag": lambda: ef.three_point_compressor("clag", TOP, zeta=2.0, axis_name=AXIS),
    "three_point v1": lambda: ef.three_point_compressor("v1", TOP, axis_name=AXIS, init="full"),
    "three_point v2": lambda: ef.three_point_compressor("v2", TOP, second=SIGN, axis_name=AXIS),
    "three_point v5": lambda: ef.three_point_compressor(
        "v5", TOP, probability=0.5, key=1, axis_name=AXIS
    ),
}
# These ask for gradients at points of their own; here they get the same gradient at each.
WITH_POINTS = {
    "cser": lambda: ef.cser(SIGN, TOP, 0.1, 2, axis_name=AXIS),
    "cser without gradients": lambda: ef.cser(SIGN, None, 0.1, 2, axis_name=AXIS),
    "marina": lambda: ef.marina(UNBIASED, 0.5, 0, axis_name=AXIS),
    "page": lambda: optax.chain(ef.page(), ef.ef21(TOP, axis_name=AXIS)),
    "storm": lambda: optax.chain(ef.storm(0.5), ef.ef21(TOP, axis_name=AXIS)),
    "hessian momentum": lambda: optax.chain(
        ef.hessian_momentum(0.5, 0), ef.ef21(TOP, axis_name=AXIS)
    ),
    "igt": lambda: optax.chain(ef.igt(0.5), ef.ef21(TOP, axis_name=AXIS)),
}
EVERY = RULES | WITH_POINTS


def mesh():
    return jax.make_mesh(
        (N,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:N]
    )


def checked(tx, params):
    """``update`` of one worker in a map that checks types, and the specs of its state."""
    flags = ef.worker_axes(tx, params, AXIS, N)
    specs = jax.tree.map(lambda own: P(AXIS) if own else P(), flags)

    def local(grads, state, params):
        grads = jax.tree.map(lambda g: g[0], grads)
        state = jax.tree.map(lambda x, own: x[0] if own else x, state, flags)
        more = dict.fromkeys(ef.query_points(state, params), grads)
        updates, state = tx.update(grads, state, params, grads=more)
        return updates, jax.tree.map(lambda x, own: x[None] if own else x, state, flags)

    update = jax.shard_map(
        local, mesh=mesh(), in_specs=(P(AXIS), specs, P()), out_specs=(P(), specs)
    )
    return update, flags


@pytest.mark.parametrize("name", EVERY)
def test_types_in_a_checked_map(name):
    """Conditions agree between workers, branches have equal types, updates are the same for all.

    Traced only: what the types say needs no compiled program. The state keeps its shapes and
    dtypes, so that it scans.
    """
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3, jnp.bfloat16)}
    tx = optax.with_extra_args_support(EVERY[name]())
    update, flags = checked(tx, params)
    lead = lambda x: jax.ShapeDtypeStruct((N, *x.shape), x.dtype)  # noqa: E731
    init = jax.vmap(lambda _: tx.init(params), axis_name=AXIS, axis_size=N)
    state = jax.tree.map(
        lambda x, own: x if own else jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        jax.eval_shape(init, jnp.zeros(N)),
        flags,
    )
    updates, after = jax.eval_shape(update, jax.tree.map(lead, params), state, params)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, updates, params))
    assert jax.tree.all(jax.tree.map(same, after, state))


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"two_shot"}))  # made only inside a map
def test_a_fresh_state_may_be_donated(name):
    """No two leaves share a buffer, with one another or with the parameters."""
    tx = EVERY[name]()
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    leaves = jax.tree.leaves((tx.init(params), params))
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)


@functools.cache
def together():
    """All rules in one program: each has its own copy of the parameters."""
    one = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    params = {name: {"w": one, "b": one[:, 0]} for name in RULES}
    labels = {name: name for name in RULES}
    return params, optax.partition({name: make() for name, make in RULES.items()}, labels)


def gradients(params, t):
    """Of every worker, in round t: (w - target) times a curvature that differs by worker."""
    rng = np.random.default_rng(t)
    scale = np.array([0.5, 1.0, 2.0, 4.0], np.float32)

    def one(x):
        noise = rng.normal(size=(N, *x.shape)).astype(np.float32)
        return scale.reshape(N, *[1] * x.ndim) * (x + noise)

    shared = jax.tree.map(one, params["ef21"])  # every rule sees the same
    return dict.fromkeys(params, shared)


@pytest.mark.slow
def test_devices_follow_the_simulation():
    params, tx = together()
    lifted = ef.simulate(tx, N, AXIS)
    update, flags = checked(tx, params)
    state = simulated = lifted.init(params)
    on_devices, in_process = jax.jit(update), jax.jit(lifted.update)
    for t in range(3):
        g = gradients(params, t)
        expected, simulated = in_process(g, simulated, params)
        got, state = on_devices(g, state, params)
        for name in RULES:
            for a, b in zip(
                jax.tree.leaves(got[name]), jax.tree.leaves(expected[name]), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=f"{name}, round {t}")
    jax.block_until_ready(state)
