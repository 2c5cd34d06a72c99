"""Safe-EF, whose constraint comes as extra arguments, in every mode beside the simulation."""

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

N, AXIS, STEPS = 4, "data", 6
SHARES = jnp.asarray([0.5, 1.0, 1.5, 1.0])[:, None]
OWN = jnp.asarray(np.random.default_rng(3).normal(size=(N, 5)), jnp.float32)
START = jnp.full(5, 0.3)
EXAMPLES = {"constraint": 0.0, "constraint_grads": START}


def chain():
    return optax.chain(ef.safe_ef(ef.top_k(k=2), axis_name=AXIS), optax.sgd(0.2))


def of_workers(x):
    """Every worker's gradient, its share of the constraint ``sum(x) >= 1``, and its gradient."""
    value = (SHARES * (1.0 - jnp.sum(x)))[:, 0]
    return x - OWN, value, -SHARES * jnp.ones_like(OWN)


def mesh(kind: AxisType = AxisType.Auto):
    return jax.make_mesh((N,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:N])


def follow(update, state):
    """The iterates, and whether each step followed the objective."""
    x, seen, safe = START, [], []
    for _ in range(STEPS):
        updates, state = update(*of_workers(x), state, x)
        x = jnp.asarray(np.asarray(x + np.asarray(updates).reshape(-1, 5)[0]))
        seen.append(np.asarray(x))
        safe.append(bool(np.asarray(state[0].safe).reshape(-1)[0]))
    return np.stack(seen), safe


def lifted(tx):
    @jax.jit
    def update(grads, value, slope, state, x):
        more = {"constraint": ef.PerWorker(value), "constraint_grads": ef.PerWorker(slope)}
        return tx.update(grads, state, x, **more)

    return follow(update, tx.init(START))


@functools.cache
def simulated():
    return lifted(ef.simulate(chain(), N, AXIS, extra_args=EXAMPLES))


def on_mesh(kind: AxisType):
    return lifted(ef.data_parallel(chain(), mesh(kind), AXIS, extra_args=EXAMPLES))


def one(grads, value, slope, state, x):
    return chain().update(grads, state, x, constraint=value, constraint_grads=slope)


def pmapped():
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), chain().init(START))
    run = jax.pmap(one, AXIS, in_axes=(0, 0, 0, 0, None), devices=jax.devices()[:N])
    return follow(run, copies)


def mapped(check: bool):
    flags = ef.parallel.worker_axes(chain(), START, AXIS, N, extra_args=EXAMPLES)
    specs = jax.tree.map(lambda own: P(AXIS) if own else P(), flags)
    lead = lambda tree, put: jax.tree.map(  # noqa: E731
        lambda leaf, own: put(leaf) if own else leaf, tree, flags
    )

    def local(grads, value, slope, state, x):
        state = lead(state, lambda leaf: leaf[0])
        updates, state = one(grads[0], value[0], slope[0], state, x)
        return updates, lead(state, lambda leaf: leaf[None])

    update = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(P(AXIS), P(AXIS), P(AXIS), specs, P()),
        out_specs=(P(), specs),
        check_vma=check,
    )
    return follow(jax.jit(update), lead(chain().init(START), lambda leaf: jnp.stack([leaf] * N)))


MODES = {
    "auto": lambda: on_mesh(AxisType.Auto),
    "explicit": lambda: on_mesh(AxisType.Explicit),
    "pmap": pmapped,
    "shard_map checked": lambda: mapped(check=True),
    "shard_map unchecked": lambda: mapped(check=False),
}


# Rules without such arguments go through all modes together, in test_modes.
QUICK = ("shard_map checked",)


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=() if m in QUICK else (pytest.mark.slow,)) for m in MODES]
)
def test_every_mode_follows_the_simulation(mode: str) -> None:
    expected, crossed = simulated()
    got, safe = MODES[mode]()
    assert any(crossed) and not all(crossed)
    assert safe == crossed
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
