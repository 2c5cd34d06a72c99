"""Every rule in every mode: what its types say, and the same numbers as in simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from tests.feedback.rules import (
    ALL,
    AXIS,
    EVERY,
    MIXED,
    RECIPES,
    RULES,
    UNSPLIT,
    N,
    together,
)

ROUNDS = 3


def mesh_of(kind=AxisType.Auto, shape=(N,), names=(AXIS,)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def by_hand(tx, params, check):
    """``update`` of one worker in a hand-written ``shard_map``, and which state leaves differ."""
    flags = ef.parallel.worker_axes(tx, params, AXIS, N)
    specs = jax.tree.map(lambda own: P(AXIS) if own else P(), flags)

    def local(grads, state, params):
        grads = jax.tree.map(lambda g: g[0], grads)
        state = jax.tree.map(lambda x, own: x[0] if own else x, state, flags)
        updates, state = tx.update(grads, state, params)
        return updates, jax.tree.map(lambda x, own: x[None] if own else x, state, flags)

    update = jax.shard_map(
        local,
        mesh=mesh_of(),
        in_specs=(P(AXIS), specs, P()),
        out_specs=(P(), specs),
        check_vma=check,
    )
    return update, flags


CHAINS = [pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in MIXED]
"""Their parts are rules, or have types of their own in the tests of recipes."""


@pytest.mark.parametrize("name", [*EVERY, *CHAINS])
def test_types_in_a_checked_map(name):
    """Conditions agree between workers, branches have equal types, updates are the same for all.

    Only traced: types need no compiled program. The state keeps its shapes and
    dtypes, so that it scans.
    """
    params = {name: {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3, jnp.bfloat16)}}
    tx = together([name])
    update, flags = by_hand(tx, params, check=True)
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


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_fresh_state_may_be_donated(name):
    """No two leaves share a buffer, with one another or with the parameters."""
    tx = ALL[name]()
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    leaves = jax.tree.leaves((tx.init(params), params))
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)


########################################################################################
# Numbers: all rules in one program a mode
########################################################################################

FEW = ("dist_ef_sgdm", "ef21 unbiased")
SPECS = {"w": P("model"), "b": P()}


def parameters(names):
    rng = np.random.default_rng(0)
    one = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    one = jax.tree.map(lambda x: x.astype(np.float32), one)
    return {name: one for name in names}


def gradients(params, t):
    """Of every worker, in round t: (x + noise) times a curvature that differs by worker."""
    rng = np.random.default_rng(t)
    scale = np.array([0.5, 1.0, 2.0, 4.0], np.float32)

    def one(x):
        noise = rng.normal(size=(N, *x.shape)).astype(np.float32)
        return scale.reshape(N, *[1] * x.ndim) * (x + noise)

    shared = jax.tree.map(one, next(iter(params.values())))  # every rule sees the same
    return dict.fromkeys(params, shared)


def follow(step, params, state, place=lambda g: g):
    """The updates of every round, as NumPy arrays."""
    seen = []
    for t in range(ROUNDS):
        updates, state = jax.block_until_ready(step(place(gradients(params, t)), state, params))
        seen.append(jax.device_get(updates))
    return seen


def simulated(names, split=False):
    params = parameters(names)
    options = {"param_specs": dict.fromkeys(names, SPECS), "model_axes": {"model": 2}}
    tx = ef.simulate(together(names), N, AXIS, **(options if split else {}))
    return follow(jax.jit(tx.update), params, tx.init(params))


def on_mesh(names, kind, split=False):
    """Lifted to a mesh; ``split`` over a second, model axis too."""
    mesh = mesh_of(kind, (N, 2), (AXIS, "model")) if split else mesh_of(kind)
    specs = dict.fromkeys(names, SPECS if split else {"w": P(), "b": P()})
    tx = ef.data_parallel(together(names), mesh, AXIS, specs if split else None)

    def put(lead):
        return lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec)))

    with jax.set_mesh(mesh):
        params = jax.tree.map(put(()), parameters(names), specs)
        place = lambda g: jax.tree.map(put((AXIS,)), g, specs)  # noqa: E731
        return follow(jax.jit(tx.update), params, tx.init(params), place)


def mapped(names, check):
    params, tx = parameters(names), together(names)
    update, flags = by_hand(tx, params, check)
    mesh = mesh_of()

    def put(x, own):  # what lies in the host's memory stays there, for every device
        spec, kind = P(AXIS) if own else P(), x.sharding.memory_kind
        return jax.device_put(x, NamedSharding(mesh, spec, memory_kind=kind))

    state = jax.tree.map(put, ef.simulate(tx, N, AXIS).init(params), flags)
    return follow(jax.jit(update), params, state)


NOT_IN_PMAP = {"on_host"}
"""``jax.pmap`` takes no arguments that lie in the host's memory."""


def pmapped(names):
    names = tuple(name for name in names if name not in NOT_IN_PMAP)
    params, tx = parameters(names), together(names)
    flags = ef.parallel.worker_axes(tx, params, AXIS, N)
    state = jax.tree.map(
        lambda x, own: x if own else np.stack([x] * N),
        ef.simulate(tx, N, AXIS).init(params),
        flags,
    )
    run = jax.pmap(tx.update, axis_name=AXIS, in_axes=(0, 0, None), devices=jax.devices()[:N])
    seen = follow(run, params, state)
    for leaf in jax.tree.leaves(seen):
        assert (leaf == leaf[:1]).all(), "the workers' updates differ"
    return [jax.tree.map(lambda x: x[0], updates) for updates in seen]


MODES = {
    "auto": lambda names: on_mesh(names, AxisType.Auto),
    "explicit": lambda names: on_mesh(names, AxisType.Explicit),
    "pmap": pmapped,
    "shard_map checked": lambda names: mapped(names, check=True),
    "shard_map unchecked": lambda names: mapped(names, check=False),
    "split auto": lambda names: on_mesh(names, AxisType.Auto, split=True),
    "split explicit": lambda names: on_mesh(names, AxisType.Explicit, split=True),
}
TYPED = tuple(name for name in ALL if name not in MIXED)
SPLIT = tuple(name for name in TYPED if name not in UNSPLIT)
KINDS = {FEW: "few", TYPED: "all", SPLIT: "all", tuple(MIXED): "mixed"}
reference = functools.cache(simulated)


@pytest.mark.parametrize(
    ("mode", "names"),
    [("shard_map unchecked", tuple(MIXED))]
    + [
        pytest.param(mode, SPLIT if "split" in mode else TYPED, marks=pytest.mark.slow)
        for mode in MODES
    ]
    + [pytest.param("auto", tuple(MIXED), marks=pytest.mark.slow)],
    ids=lambda x: x if isinstance(x, str) else KINDS[x],
)
def test_devices_follow_the_simulation(mode, names):
    """Every number, also on split parameters; a residual that is exactly zero stays zero."""
    split = mode.startswith("split")
    got, expected = MODES[mode](names), reference(names, split)
    wrong = []
    for t, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert set(names) - set(one) <= (NOT_IN_PMAP if mode == "pmap" else set())
        for name in one:
            for a, b in zip(jax.tree.leaves(one[name]), jax.tree.leaves(other[name]), strict=True):
                if not np.allclose(a, b, rtol=2e-5, atol=2e-6):
                    wrong.append(f"{name}, round {t}: off by {np.max(np.abs(a - b)):.2g}")
    assert not wrong, wrong


@pytest.mark.slow
def test_split_parameters_are_compressed_slice_by_slice():
    """The reference of the split modes differs from the result for whole parameters."""
    whole, split = reference(FEW, False), reference(FEW, True)
    for name in FEW:
        off = [np.abs(a[name]["w"] - b[name]["w"]) for a, b in zip(whole, split, strict=True)]
        assert np.max(off) > 1e-2, name


########################################################################################
# Descent
########################################################################################

# Without memory of what was not sent, these stay away from the optimum of workers that differ.
WITHOUT_MEMORY = {"compressed_mean", "ef21_p", "neolithic"}
# Clipping is biased if workers differ, and a table with fewer cells than entries adds noise.
BIASED = {"dgc", "fetch_sgd"}
# Used here with a compressor that is unbiased but not contractive, for which they are not meant.
NOT_CONTRACTIVE = {"ef21 unbiased", "ef21_momentum", "error_feedback corrected"}
# Its directions are those of earlier gradients, and a gradient may be orthogonal to all of them.
WITHOUT_CONSTANTS = {"gradiveq"}


@pytest.mark.slow
def test_every_rule_descends_where_workers_differ():
    """Parabolas of four workers with distant optima: all rules end near the common one."""
    left_out = WITHOUT_MEMORY | BIASED | NOT_CONTRACTIVE | WITHOUT_CONSTANTS
    names = tuple(RULES.keys() - left_out)
    curvature = jnp.asarray([0.5, 1.0, 1.5, 2.0])
    own = jnp.asarray(np.random.default_rng(2).normal(size=(N, 8)), jnp.float32)
    best = (curvature @ own) / curvature.sum()
    tx = ef.simulate(together(names, rate=0.02), N, AXIS)
    params = dict.fromkeys(names, {"x": best + 3.0})

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(
            lambda x: curvature[:, None] * (x - own),
            params,
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=1500)[0][0])
    end = jax.device_get(run(params))
    far = {
        n: float(np.linalg.norm(end[n]["x"] - best) / np.linalg.norm(3.0 * np.ones(8)))
        for n in names
    }
    assert {n: d for n, d in far.items() if not d < 0.1} == {}
