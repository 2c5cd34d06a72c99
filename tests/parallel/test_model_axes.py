"""Parameters that are split over model axes: every device compresses the slice it owns.

Two branches of one tree: ``top`` (top-k, compared with a NumPy oracle slice by slice) and ``rand``
(random-k, whose masks are read from what was sent).
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef

STEPS, RATIO = 4, 0.25
TAU, RATE, DECAY = 0.5, 0.125, 0.5
SHAPES = {"row": (8, 3), "column": (3, 8), "whole": (7,)}
CODECS = {"top": ef.top_k(RATIO), "rand": ef.random_k(RATIO, key=5)}

# name -> (mesh shape, mesh axes, spec of each parameter)
LAYOUTS = {
    "model": (
        (4, 2),
        ("data", "model"),
        {"row": P("model"), "column": P(None, "model"), "whole": P()},
    ),
    "fsdp and tp": (
        (2, 2, 2),
        ("data", "fsdp", "tp"),
        {"row": P(("fsdp", "tp")), "column": P(None, "tp"), "whole": P()},
    ),
}


def branches(leaves):
    return {branch: dict(leaves) for branch in CODECS}


def workers(layout):
    return LAYOUTS[layout][0][0]


def chain():
    """The clip comes after the exchange: it must see the norm of the whole, not of a slice."""
    return optax.chain(
        optax.trace(DECAY),
        ef.error_feedback(
            ef.per_leaf(lambda path, _: CODECS[path.split("/")[0]]), axis_name="data"
        ),
        optax.clip_by_global_norm(TAU),
        optax.sgd(RATE, momentum=DECAY),
    )


def draw(seed, lead=()):
    rng = np.random.default_rng(seed)
    return {
        branch: {k: rng.normal(size=(*lead, *s)).astype(np.float32) for k, s in SHAPES.items()}
        for branch in CODECS
    }


START = draw(0)


def gradients(step, layout):
    return draw(1 + step, (workers(layout),))


########################################################################################
# The oracle
########################################################################################


def slices(layout, name):
    """The index of every slice of a leaf."""
    shape, axes, specs = LAYOUTS[layout]
    sizes, cuts = dict(zip(axes, shape, strict=True)), []
    for d, length in enumerate(SHAPES[name]):
        entry = specs[name][d] if d < len(specs[name]) else None
        names = (entry,) if isinstance(entry, str) else entry or ()
        parts = int(np.prod([sizes[a] for a in names], dtype=int))
        step = length // parts
        cuts.append([slice(i * step, (i + 1) * step) for i in range(parts)])
    return list(itertools.product(*cuts))


def kept(size):
    return -(-size // 4)


def oracle(layout, residuals):
    """Iterates and residuals; the masks of ``rand`` are taken from the residuals found."""
    n = workers(layout)
    keys = [(branch, name) for branch in CODECS for name in SHAPES]
    x = {(b, k): START[b][k].astype(float) for b, k in keys}
    v = {key: np.zeros_like(x[key]) for key in keys}
    m = {key: np.zeros((n, *x[key].shape)) for key in keys}
    e = {key: np.zeros((n, *x[key].shape)) for key in keys}
    trajectory = []
    for step in range(STEPS):
        grads, mean = gradients(step, layout), {}
        for b, k in keys:
            key, sent = (b, k), []
            for i in range(n):
                m[key][i] = DECAY * m[key][i] + grads[b][k][i]
                p = m[key][i] + e[key][i]
                c = np.zeros_like(p)
                for part in slices(layout, k):
                    if b == "rand":
                        mask = residuals[step][b][k][i][part] == 0
                    else:
                        order = np.argsort(-np.abs(p[part]).ravel(), kind="stable")
                        mask = np.zeros(p[part].size, bool)
                        mask[order[: kept(mask.size)]] = True
                        mask = mask.reshape(p[part].shape)
                    c[part] = np.where(mask, p[part], 0.0)
                e[key][i] = p - c
                sent.append(c)
            mean[key] = np.mean(sent, axis=0)
        norm = np.sqrt(sum((u**2).sum() for u in mean.values()))
        assert norm > TAU, "the clip must be at work"
        for key in keys:
            v[key] = DECAY * v[key] + mean[key] * TAU / norm
            x[key] = x[key] - RATE * v[key]
        as_tree = lambda d: {b: {k: d[b, k].copy() for k in SHAPES} for b in CODECS}  # noqa: E731
        trajectory.append((as_tree(x), as_tree(e)))
    return trajectory


########################################################################################
# The ways to run it
########################################################################################


class Run:
    """Trajectory, final state and compiled program of one way."""

    def __init__(self, tx, layout, mesh=None):
        specs = LAYOUTS[layout][2]
        self.tx, self.specs, self.layout, self.mesh = tx, branches(specs), layout, mesh

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = START if mesh is None else self.place(START)
        self.fresh = state = tx.init(params)
        if mesh is not None:
            # A compiled program accepts only the placement of the first step.
            step = step.lower(params, state, self.grads(0)).compile()
            self.report = ef.wire_report(step)
        self.trajectory = []
        for t in range(STEPS):
            params, state = jax.block_until_ready(step(params, state, self.grads(t)))
            self.trajectory.append(jax.device_get((params, state[1].residual)))
        self.params, self.state, self.step = params, state, step

    def place(self, tree, lead=()):
        put = lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, P(*lead, *spec)))  # noqa: E731
        return jax.tree.map(put, tree, self.specs)

    def grads(self, t):
        tree = gradients(t, self.layout)
        return tree if self.mesh is None else self.place(tree, ("data",))


@functools.cache
def run(way, layout):
    shape, axes, specs = LAYOUTS[layout]
    if way == "simulate":
        sizes = dict(zip(axes[1:], shape[1:], strict=True))
        tx = ef.simulate(
            chain(), workers(layout), "data", param_specs=branches(specs), model_axes=sizes
        )
        return Run(tx, layout)
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes), devices=devices)
    given = branches(specs) if way == "auto, specs given" else None
    with jax.set_mesh(mesh):
        return Run(ef.data_parallel(chain(), mesh, "data", given), layout, mesh)


# Devices in one layout and the simulation of the other; the rest are slow.
WAYS = [
    pytest.param("auto", "model", marks=pytest.mark.slow),
    pytest.param("explicit", "model", marks=pytest.mark.slow),
    pytest.param("simulate", "model"),
    pytest.param("auto, specs given", "fsdp and tp"),
    pytest.param("simulate", "fsdp and tp", marks=pytest.mark.slow),
]
ON_DEVICES = [case for case in WAYS if case.values[0] != "simulate"]


########################################################################################
# Tests
########################################################################################


@pytest.mark.parametrize(("way", "layout"), WAYS)
def test_every_slice_follows_the_oracle(way, layout):
    found = run(way, layout).trajectory
    wanted = oracle(layout, [e for _, e in found])
    for got, want in zip(found, wanted, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), got, want)


# The simulation of the last layout is a slow case.
@pytest.mark.parametrize(
    ("way", "layout"),
    [*ON_DEVICES[:-1], pytest.param(*ON_DEVICES[-1].values, marks=pytest.mark.slow)],
)
def test_simulation_is_deployment(way, layout):
    """All random masks are the same, and all numbers are equal to rounding."""
    for a, b in zip(run(way, layout).trajectory, run("simulate", layout).trajectory, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x == 0, y == 0), a[1], b[1])


@pytest.mark.parametrize(("way", "layout"), WAYS)
def test_each_slice_sends_its_own_random_mask(way, layout):
    residual = run(way, layout).trajectory[0][1]["rand"]
    for name in SHAPES:
        parts = [residual[name][(0, *part)] == 0 for part in slices(layout, name)]
        for mask in parts:
            assert mask.sum() == kept(mask.size)
    distinct = {(residual["row"][(0, *part)] == 0).tobytes() for part in slices(layout, "row")}
    assert len(distinct) > 1, "the slices drew the same mask"


@pytest.mark.parametrize(("way", "layout"), ON_DEVICES)
def test_the_state_is_split_as_its_parameter(way, layout):
    one = run(way, layout)
    specs = LAYOUTS[layout][2]
    for state in (one.fresh, one.state):
        trace, feedback, _, (momentum, _) = state
        for branch, name in itertools.product(CODECS, SHAPES):
            own = NamedSharding(one.mesh, P("data", *specs[name]))
            same = NamedSharding(one.mesh, specs[name])
            for tree, sharding in (
                (trace.trace, own),
                (feedback.residual, own),
                (momentum.trace, same),
            ):
                leaf = tree[branch][name]
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert feedback.exchange.step.sharding.is_fully_replicated


@pytest.mark.parametrize(("way", "layout"), ON_DEVICES)
def test_nothing_is_gathered_over_a_model_axis(way, layout):
    """One gather of the slice's message over data; over model only sums of a few bytes."""
    report, n = run(way, layout).report, workers(layout)
    gathers = report.of("gather").collectives
    assert [c.group_size for c in gathers] == [n]
    bits = 64  # the header
    for name, compressor in itertools.product(SHAPES, CODECS.values()):
        bits += compressor.codec.bits(np.empty(SHAPES[name])[slices(layout, name)[0]].shape)
    assert gathers[0].message_bytes == 4 * math.ceil(bits / 32)
    others = [c for c in report.collectives if c not in gathers]
    assert others and all(c.kind == "reduce" for c in others)
    if layout == "model":  # here the group size identifies the axis
        assert all(c.group_size == 2 for c in others)
    assert sum(c.message_bytes for c in others) <= 64


def test_a_nan_in_one_slice_of_one_worker_is_skipped_by_all():
    one = run("auto, specs given", "fsdp and tp")
    grads = gradients(0, "fsdp and tp")
    grads["top"]["row"][1, 7, 0] = np.nan
    params, state = one.step(one.params, one.state, one.place(grads, ("data",)))
    assert int(state[1].exchange.skipped) == 1
    before, after = (one.params, one.state[1].residual), (params, state[1].residual)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_split_that_does_not_divide_is_refused():
    tx = ef.simulate(chain(), 2, "data", param_specs=P("model"), model_axes={"model": 2})
    with pytest.raises(ValueError, match="cannot be split in 2 parts"):
        tx.init({"top": jnp.ones(7)})
