"""Simulation is deployment: one NumPy oracle of distributed EF14 against every way to run it.

Three codecs share one chain (one compile a mode, not three): the branches of the parameter tree
``top``, ``sign`` and ``rand`` are compressed by top-k, scaled sign and random-k.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ef_optax as ef

WORKERS, STEPS = 4, 6
RATIO = 0.3
# Powers of two make products exact, so a program that contracts a*b+c to one instruction
# rounds like one that does not, and devices can be compared to the last bit.
LOCAL_MOMENTUM, MOMENTUM, RATE = 0.5, 0.5, 0.125
SHAPES = {"w": (2, 3), "b": (6,), "s": ()}
BRANCHES = ("top", "sign", "rand")
CODECS = {
    "top": ef.top_k(RATIO),
    "sign": ef.scaled_sign(),
    "rand": ef.random_k(RATIO, key=11),
}


def chain():
    policy = ef.per_leaf(lambda path, like: CODECS[path.split("/")[0]])
    return optax.chain(
        optax.trace(LOCAL_MOMENTUM),
        ef.error_feedback(policy, axis_name="data"),
        optax.sgd(RATE, momentum=MOMENTUM),
    )


def draw(sample, lead=()):
    return {
        branch: {name: sample((*lead, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
        for branch in BRANCHES
    }


RNG = np.random.default_rng(0)
START = draw(lambda shape: RNG.normal(size=shape))
DATA = {
    "target": draw(lambda shape: RNG.normal(size=shape), (WORKERS,)),
    "curvature": draw(lambda shape: RNG.choice([0.25, 0.5, 1.0], shape), (WORKERS,)),
}


def loss(params, batch):
    """A different parabola for each worker; its leaves have a leading axis of one example."""
    terms = jax.tree.map(
        lambda p, t, h: jnp.sum(h[0] * (p - t[0]) ** 2), params, batch["target"], batch["curvature"]
    )
    return 0.5 * jnp.sum(jnp.stack(jax.tree.leaves(terms)))


########################################################################################
# The oracle
########################################################################################


def kept(size: int) -> int:
    return max(1, -(-size * 3 // 10))


def compress(branch, p, mask):
    """C(p) in float64; random-k takes its mask from what was really sent."""
    if branch == "sign":
        return np.mean(np.abs(p)) * np.where(p >= 0, 1.0, -1.0)
    if branch == "top":
        flat = np.abs(p).ravel()
        mask = np.zeros(p.size, bool)
        mask[np.argsort(-flat, kind="stable")[: kept(p.size)]] = True
        mask = mask.reshape(p.shape)
    return np.where(mask, p, 0.0)


def oracle(branch, name, masks):
    """The trajectory of one leaf: iterates (T, ...) and residuals (T, n, ...)."""
    x = START[branch][name].astype(np.float64)
    t, h = (DATA[key][branch][name].astype(np.float64) for key in ("target", "curvature"))
    m, e, v = np.zeros_like(t), np.zeros_like(t), np.zeros_like(x)
    xs, es = [], []
    for step in range(STEPS):
        sent = []
        for i in range(WORKERS):
            m[i] = LOCAL_MOMENTUM * m[i] + h[i] * (x - t[i])
            p = m[i] + e[i]
            c = compress(branch, p, masks[step, i])
            e[i] = p - c
            sent.append(c)
        v = MOMENTUM * v + np.mean(sent, axis=0)
        x = x - RATE * v
        xs.append(x.copy())
        es.append(e.copy())
    return np.array(xs), np.array(es)


########################################################################################
# The modes: each returns iterates and residuals of all steps
########################################################################################


def record(step, params, state, residual_of):
    xs, es = [], []
    for _ in range(STEPS):
        params, state = jax.block_until_ready(step(params, state))
        xs.append(jax.device_get(params))
        es.append(jax.device_get(residual_of(state)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *zip(xs, es, strict=True))


def lifted_step(tx, where):
    def step(params, state):
        _, grads = ef.worker_value_and_grad(loss, where, "data")(params, DATA)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def mesh_of(kind=AxisType.Auto, shape=(WORKERS,), names=("data",)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def simulated():
    tx = ef.simulate(chain(), WORKERS, "data")
    step = jax.jit(lifted_step(tx, WORKERS))
    return record(step, START, tx.init(START), lambda s: s[1].residual)


def on_mesh(mesh):
    tx = ef.data_parallel(chain(), mesh, "data")
    with jax.set_mesh(mesh):
        params = jax.device_put(START, jax.NamedSharding(mesh, P()))
        step = jax.jit(lifted_step(tx, mesh))
        return record(step, params, tx.init(params), lambda s: s[1].residual)


def scanned():
    mesh = mesh_of()
    tx = ef.data_parallel(chain(), mesh, "data")
    step = lifted_step(tx, mesh)

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = step(*carry)
            return (params, state), (params, state[1].residual)

        return jax.lax.scan(body, (params, state), None, length=STEPS)[1]

    return jax.device_get(run(START, tx.init(START)))


def pmapped():
    """Everything by hand: parameters and state are copies on each device."""
    tx = chain()

    def step(params, state, batch):
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[None], batch))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.pmap(step, axis_name="data", devices=jax.devices()[:WORKERS])
    copies = jax.tree.map(lambda x: np.stack([x] * WORKERS), (START, jax.jit(tx.init)(START)))
    xs, es = record(lambda p, s: run(p, s, DATA), *copies, lambda s: s[1].residual)
    for leaf in jax.tree.leaves(xs):
        assert (leaf == leaf[:, :1]).all(), "the workers' parameters have drifted apart"
    return jax.tree.map(lambda x: x[:, 0], xs), es


def mapped(check):
    """A hand-written ``shard_map``, with the specs of the state from ``worker_axes``."""
    mesh, tx = mesh_of(), chain()
    flags = ef.parallel.worker_axes(tx, START, "data", WORKERS)
    specs = jax.tree.map(lambda own: P("data") if own else P(), flags)

    def local(params, state, batch):
        state = jax.tree.map(lambda x, own: x[0] if own else x, state, flags)
        own = jax.lax.pcast(params, "data", to="varying") if check else params
        updates, state = tx.update(jax.grad(loss)(own, batch), state, params)
        state = jax.tree.map(lambda x, own: x[None] if own else x, state, flags)
        return optax.apply_updates(params, updates), state

    run = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs),
            check_vma=check,
        )
    )
    state = jax.tree.map(
        lambda x, own: np.stack([x] * WORKERS) if own else x, jax.jit(tx.init)(START), flags
    )
    return record(lambda p, s: run(p, s, DATA), START, state, lambda s: s[1].residual)


MODES = {
    "auto": lambda: on_mesh(mesh_of()),
    "simulate": simulated,
    "pmap": pmapped,
    "shard_map_checked": lambda: mapped(check=True),
    "shard_map_unchecked": lambda: mapped(check=False),
    "explicit": lambda: on_mesh(mesh_of(AxisType.Explicit)),
    "partly_manual": lambda: on_mesh(mesh_of(shape=(WORKERS, 2), names=("data", "model"))),
    "scan": scanned,
}


@functools.cache
def trajectory(mode):
    return MODES[mode]()


########################################################################################
# Tests
########################################################################################


# The others differ from these by what is around the exchange alone.
QUICK = ("simulate", "auto")
EVERY_MODE = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MODES]


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_mode_follows_the_oracle(mode, branch):
    xs, es = trajectory(mode)
    for name, shape in SHAPES.items():
        got_x, got_e = xs[branch][name], es[branch][name]
        masks = got_e == 0  # a sent entry leaves a residual of exactly zero
        if branch == "rand":
            counts = masks.reshape(STEPS, WORKERS, -1).sum(-1)
            assert (counts == kept(int(np.prod(shape)))).all()
        want_x, want_e = oracle(branch, name, masks)
        np.testing.assert_allclose(got_x, want_x, rtol=1e-5, atol=5e-6, err_msg=f"x of {name}")
        np.testing.assert_allclose(got_e, want_e, rtol=1e-5, atol=5e-6, err_msg=f"e of {name}")


BY_HAND = ("pmap", "shard_map_checked", "shard_map_unchecked")


@pytest.mark.parametrize("mode", [mode for mode in EVERY_MODE if mode.values != ("auto",)])
def test_modes_agree_with_each_other(mode):
    """The lift gives the same bits on every kind of mesh; so do hand-written maps, whose programs
    are fused differently. A simulation must agree only to rounding."""
    reference, got = trajectory("auto"), trajectory(mode)
    for want, have in zip(jax.tree.leaves(reference), jax.tree.leaves(got), strict=True):
        assert have.shape == want.shape
        if mode == "simulate" or mode in BY_HAND:
            np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(have, want)
    if mode in BY_HAND:
        jax.tree.map(np.testing.assert_array_equal, got, trajectory(BY_HAND[0]))
    masks = [jax.tree.map(lambda e: e == 0, t[1]["rand"]) for t in (reference, got)]
    jax.tree.map(np.testing.assert_array_equal, *masks)


def test_random_masks_differ_between_steps_workers_and_leaves():
    _, es = trajectory("auto")
    masks = {name: (es["rand"][name] == 0).reshape(STEPS, WORKERS, -1) for name in ("w", "b")}
    for mask in masks.values():
        assert not (mask == mask[:1]).all() and not (mask == mask[:, :1]).all()
    assert not (masks["w"] == masks["b"]).all()


@pytest.mark.parametrize("make", [ef.error_feedback, ef.compressed_mean])
def test_gradients_that_are_already_reduced_are_refused(make):
    """In a checked map the gradient of replicated parameters is already summed."""
    tx = make(ef.top_k(RATIO), axis_name="data")
    params = {"w": jnp.ones((2, 3))}

    def local(params, x):
        grads = jax.grad(lambda p: jnp.sum(p["w"] * x))(params)
        return tx.update(grads, tx.init(params), params)[0]

    run = jax.shard_map(local, mesh=mesh_of(), in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="already reduced") as caught:
        jax.eval_shape(run, params, jnp.ones((WORKERS, 1)))
    text = str(caught.value)
    assert "updates['w']" in text and "pcast(params" in text and "worker_value_and_grad" in text
