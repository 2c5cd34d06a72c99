"""Every way to run a transformation of N workers; each gives the updates and params of its steps.

The parameters move on the host, in NumPy, so that a program is held to what it emits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks.record.names import public
from tests.feedback.rules import AXIS, WHOLE, N, together

STEPS = 4
RATE = 0.125
MODEL = {"w": P("model"), "b": P()}
"""How leaves are split over the second axis of a two-dimensional mesh."""
OPTIMIZERS = {name.split()[0] for name in WHOLE}
"""First words of the rules whose updates are steps already."""

Tree = dict[str, Any]
Trajectory = list[tuple[Tree, Tree]]


def parameters() -> Tree:
    """Of one rule: a matrix whose rows may be split, and a vector."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (5,)}
    return {name: np.asarray(rng.normal(size=s), np.float32) for name, s in shapes.items()}


def gradients(params: Tree, step: int) -> Tree:
    """Of every worker: (x + noise) times a curvature that differs by worker; for every rule."""
    scale = np.array([0.5, 1.0, 2.0, 4.0], np.float32)

    def one(x: Any, noise: np.ndarray) -> np.ndarray:
        return scale.reshape(N, *[1] * x.ndim) * (x + noise)

    rng = np.random.default_rng(1 + step)
    shapes = {name: x.shape for name, x in parameters().items()}
    noise = {n: rng.normal(size=(N, *s)).astype(np.float32) for n, s in shapes.items()}
    return {rule: jax.tree.map(one, tree, noise) for rule, tree in params.items()}


def moved(params: Tree, updates: Tree) -> Tree:
    """Parameters after a step: that of a whole optimizer, or one of gradient descent."""
    after = {}
    for rule, tree in params.items():
        factor = np.float32(1.0 if rule.split()[0] in OPTIMIZERS else -RATE)
        one = lambda x, u, f=factor: np.asarray(x + f * u)  # noqa: E731
        after[rule] = jax.tree.map(one, tree, updates[rule])
    return after


def follow(
    step: Callable[..., Any],
    params: Tree,
    state: Any,
    put: Callable[[Tree], Tree] = lambda tree: tree,
    put_grads: Callable[[Tree], Tree] = lambda tree: tree,
) -> Trajectory:
    """Runs all steps."""
    seen = []
    for t in range(STEPS):
        grads = put_grads(gradients(params, t))
        updates, state = jax.block_until_ready(step(grads, state, put(params)))
        updates = jax.device_get(updates)
        params = moved(params, updates)
        seen.append((updates, params))
    return seen


def simulated(names: Iterable[str], split: bool = False) -> Trajectory:
    """All workers in one process; ``split`` gives the trajectory of split parameters."""
    params = {name: parameters() for name in names}
    options = {"param_specs": dict.fromkeys(params, MODEL), "model_axes": {"model": 2}}
    tx = ef.simulate(together(params), N, AXIS, **(options if split else {}))
    return follow(jax.jit(tx.update), params, jax.jit(tx.init)(params))


@functools.lru_cache(maxsize=1)
def fresh(names: tuple[str, ...]) -> Any:
    """The state in which those who map by hand start, and which of its leaves differ by worker."""
    params = {name: parameters() for name in names}
    tx = ef.simulate(together(params), N, AXIS)
    return jax.jit(tx.init)(params), public("worker_axes")(together(params), params, AXIS, N)


def on_mesh(names: Iterable[str], kind: AxisType, split: bool = False) -> Trajectory:
    """Lifted to a mesh; ``split`` over a second axis, "model", too."""
    params = {name: parameters() for name in names}
    mesh = mesh_of(kind, {AXIS: N, "model": 2} if split else {AXIS: N})
    specs = dict.fromkeys(params, MODEL if split else dict.fromkeys(MODEL, P()))
    tx = ef.data_parallel(together(params), mesh, AXIS, specs if split else None)

    def put(*lead: str) -> Callable[[Tree], Tree]:
        def one(x: Any, spec: P) -> jax.Array:
            return jax.device_put(x, NamedSharding(mesh, P(*lead, *spec)))

        return lambda tree: jax.tree.map(one, tree, specs)

    with jax.set_mesh(mesh):
        return follow(jax.jit(tx.update), params, tx.init(put()(params)), put(), put(AXIS))


def mesh_of(kind: AxisType, sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh over the first devices."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    kinds = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def mapped(names: Iterable[str], check: bool) -> Trajectory:
    """A hand-written ``shard_map``."""
    params = {name: parameters() for name in names}
    tx, (state, flags) = together(params), fresh(tuple(params))
    specs = jax.tree.map(lambda own: P(AXIS) if own else P(), flags)

    def local(grads: Tree, state: Any, params: Tree) -> Any:
        grads = jax.tree.map(lambda g: g[0], grads)
        state = jax.tree.map(lambda x, own: x[0] if own else x, state, flags)
        updates, state = tx.update(grads, state, params)
        return updates, jax.tree.map(lambda x, own: x[None] if own else x, state, flags)

    update = jax.shard_map(
        local,
        mesh=mesh_of(AxisType.Auto, {AXIS: N}),
        in_specs=(P(AXIS), specs, P()),
        out_specs=(P(), specs),
        check_vma=check,
    )
    return follow(jax.jit(update), params, state)


def pmapped(names: Iterable[str]) -> Trajectory:
    """By ``pmap``; refuses updates that differ between workers."""
    params = {name: parameters() for name in names}
    tx, (state, flags) = together(params), fresh(tuple(params))
    state = jax.tree.map(lambda x, own: x if own else np.stack([x] * N), state, flags)
    run = jax.pmap(tx.update, axis_name=AXIS, in_axes=(0, 0, None), devices=jax.devices()[:N])

    def step(grads: Tree, state: Any, params: Tree) -> Any:
        updates, state = run(grads, state, params)
        updates = jax.device_get(updates)
        for leaf in jax.tree.leaves(updates):
            if not np.array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape), equal_nan=True):
                raise AssertionError("the workers' updates differ")
        return jax.tree.map(lambda x: x[0], updates), state

    return follow(step, params, state)


MODES: dict[str, Callable[[Iterable[str]], Trajectory]] = {
    "simulate": simulated,
    "auto": lambda names: on_mesh(names, AxisType.Auto),
    "explicit": lambda names: on_mesh(names, AxisType.Explicit),
    "pmap": pmapped,
    "shard_map checked": lambda names: mapped(names, check=True),
    "shard_map unchecked": lambda names: mapped(names, check=False),
    "split auto": lambda names: on_mesh(names, AxisType.Auto, split=True),
    "split explicit": lambda names: on_mesh(names, AxisType.Explicit, split=True),
    "split simulate": lambda names: simulated(names, split=True),
}
USUAL = tuple(MODES)[:7]
FEW = ("simulate", "auto", "shard_map checked")
"""One mode of each kind."""
