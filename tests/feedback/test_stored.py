"""Memories stored as messages: bytes, trajectories against NumPy, what is lost, every mode."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax.extend import Memory, Stored
from tests.feedback.rules import side_by_side

N, AXIS, STEPS = 3, "data", 4
BLOCK, LEVELS = 4, 7  # of block_quantize(4, block=4)
NEAREST = ef.block_quantize(4, block=BLOCK)
TOP = ef.top_k(k=3)

RULES = {
    "error_feedback": (lambda m: ef.error_feedback(TOP, axis_name=AXIS, memory=m), 1),
    "ef21": (lambda m: ef.ef21(TOP, axis_name=AXIS, memory=m), 2),
    "econtrol": (lambda m: ef.econtrol(TOP, 0.25, axis_name=AXIS, memory=m), 3),
    "dgc": (lambda m: ef.dgc(TOP, momentum=0.5, axis_name=AXIS, memory=m), 2),
}
"""How a rule is made with a memory, and the number of its memories."""


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, 4.0),
        (ef.cast("bfloat16", key=0), 2.0),
        (ef.block_quantize(8, block=128, key=0), 1.03125),
        (ef.block_quantize(4, block=128, key=0), 0.53125),
        (ef.fcc(ef.block_quantize(8, block=128, key=0), 2), 2.0625),
        (ef.top_k(0.125), 0.125 * (4 + 15 / 8)),
    ],
    ids=["float32", "bfloat16", "8 bits", "4 bits", "8 bits twice", "top-m"],
)
@pytest.mark.parametrize("rule", RULES)
def test_bytes_a_value(rule: str, memory: Any, expected: float) -> None:
    make, memories = RULES[rule]
    params = jnp.zeros((256, 128))
    state = jax.eval_shape(make(memory).init, params)._replace(exchange=())
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    counters = 4 * memories if memory is not None else 0  # of what is lost
    assert total == memories * params.size * expected + counters


# ---------------------------------------------------------------------------- NumPy


def quantised(x: np.ndarray) -> np.ndarray:
    """Blocks of 4 along the flattened array, 15 levels relative to the largest, to nearest."""
    blocks = np.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    step = np.abs(blocks).max(1, keepdims=True) / LEVELS
    codes = np.round(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0))
    return (codes * step).ravel()[: x.size].reshape(x.shape)


def top(x: np.ndarray, k: int = 3) -> np.ndarray:
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x).ravel(), kind="stable")[:k]] = True
    return np.where(mask.reshape(x.shape), x, 0)


def workers_of(shape: tuple[int, ...]) -> np.ndarray:
    """Gradients (steps, workers, ...) without ties."""
    return np.random.default_rng(7).normal(size=(STEPS, N, *shape)).astype(np.float32)


def oracle(rule: str, grads: np.ndarray, Q: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """What a rule emits in each step, its last memories, and the 1-norm of what Q lost of them."""
    zero = np.zeros(grads.shape[1:])
    names = {"error_feedback": "e", "ef21": "hg", "econtrol": "ehg", "dgc": "uv"}[rule]
    kept = {name: zero[0] if name == "g" else zero for name in names}
    lost = dict.fromkeys(names, 0.0)

    def store(name: str, value: np.ndarray) -> None:
        shared = name == "g"
        kept[name] = Q(value) if shared else np.stack([Q(row) for row in value])
        error = np.abs(value - kept[name])
        lost[name] = lost[name] + (error.sum() if shared else error.reshape(N, -1).sum(1))

    emitted = []
    for g in grads.astype(np.float64):
        if rule == "error_feedback":
            p = g + kept["e"]
            c = np.stack([top(row) for row in p])
            store("e", p - c)
            emitted.append(c.mean(0))
        elif rule == "dgc":
            u = 0.5 * kept["u"] + g
            v = kept["v"] + u
            c = np.stack([top(row) for row in v])
            store("u", np.where(c != 0, 0, u))
            store("v", v - c)
            emitted.append(c.mean(0))
        else:
            e = kept["e"] if rule == "econtrol" else zero
            h = kept["h"]
            c = np.stack([top(row) for row in 0.25 * e + g - h])
            mean = kept["g"] + c.mean(0)
            if rule == "econtrol":
                store("e", e + g - h - c)
            store("h", h + c)
            store("g", mean)
            emitted.append(mean)
    return emitted, {"kept": kept, "lost": lost}


FIELDS = {"e": "residual", "h": "estimate", "g": "mean", "u": "momentum", "v": "residual"}
SHAPE = (5, 3)


def run(memory: Any, update: Any, state: Any) -> tuple[list[Any], Any]:
    emitted = []
    for g in workers_of(SHAPE):
        updates, state = update({rule: jnp.asarray(g) for rule in RULES}, state, None)
        emitted.append(jax.device_get(updates))
    return emitted, jax.device_get(state)


@functools.cache
def outcome(where: str, memory: Any) -> tuple[list[Any], Any]:
    """All rules in one program, on three workers."""
    tx = side_by_side({rule: make(memory) for rule, (make, _) in RULES.items()})
    params = {rule: jnp.zeros(SHAPE) for rule in RULES}
    if where == "simulate":
        tx = ef.simulate(tx, N, AXIS)
        return run(memory, jax.jit(tx.update), tx.init(params))
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((N,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:N])
    with jax.set_mesh(mesh):
        tx = ef.data_parallel(tx, mesh, AXIS)
        params = jax.device_put(params, NamedSharding(mesh, P()))
        return run(memory, jax.jit(tx.update), tx.init(params))


@pytest.mark.parametrize(
    "where",
    ["simulate", *(pytest.param(where, marks=pytest.mark.slow) for where in ("auto", "explicit"))],
)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_follows_numpy(rule: str, where: str) -> None:
    """Updates, memories, and how much was lost."""
    emitted, states = outcome(where, NEAREST)
    expected, memories = oracle(rule, workers_of(SHAPE), quantised)
    for got, want in zip(emitted, expected, strict=True):
        np.testing.assert_allclose(got[rule], want, rtol=1e-5, atol=1e-5)
    for name, want in memories["kept"].items():
        stored = getattr(states[rule], FIELDS[name])[rule]
        np.testing.assert_allclose(Memory.read(stored), want, rtol=1e-5, atol=1e-5)
        lost = memories["lost"][name]
        assert np.all(lost > 0.1)
        np.testing.assert_allclose(stored.lost, lost, rtol=1e-4)


@pytest.mark.parametrize(
    "memory",
    [pytest.param(ef.identity(), id="identity", marks=pytest.mark.slow), "float32"],
)
def test_float32_is_no_storage_at_all(memory: Any) -> None:
    plain, same = outcome("simulate", None), outcome("simulate", memory)
    assert jax.tree.structure(plain) == jax.tree.structure(same)
    jax.tree.map(np.testing.assert_array_equal, plain, same)


# ---------------------------------------------------------------------------- noise


def test_noise_is_fresh_in_every_step_and_of_each_workers_own() -> None:
    memory = ef.block_quantize(2, key=3)
    tx = ef.simulate(ef.error_feedback(ef.top_k(k=1), axis_name=AXIS, memory=memory), 2, AXIS)
    g = jnp.broadcast_to(jnp.linspace(1.0, 2.0, 40), (2, 40))
    update, states = jax.jit(tx.update), [tx.init(g[0])]
    for _ in range(2):
        states.append(update(g, states[0]._replace(exchange=states[-1].exchange))[1])
    first, second = (np.asarray(Memory.read(state.residual)) for state in states[1:])
    assert (first[0] != first[1]).any() and (first[0] != second[0]).any()


def test_what_all_workers_hold_stays_the_same_on_all() -> None:
    """The lift would refuse an emitted mean that differs, so it also has no worker axis."""
    memory = ef.block_quantize(2, key=3)
    tx = ef.simulate(ef.ef21(ef.top_k(k=1), axis_name=AXIS, memory=memory), 2, AXIS)
    state = tx.init(jnp.zeros(40))
    assert state.mean.lost.shape == () and state.estimate.lost.shape == (2,)


# ---------------------------------------------------------------------------- split parameters

SPLIT, WHOLE = (4, 6), (5,)
SPECS = {"w": P(None, "model"), "b": P()}


@functools.cache
def split(where: str) -> tuple[list[Any], Any, Any, Any]:
    rule = ef.error_feedback(TOP, axis_name=AXIS, memory=NEAREST)
    params = {"w": jnp.zeros(SPLIT), "b": jnp.zeros(WHOLE)}
    rng = np.random.default_rng(2)
    grads = [
        {k: rng.normal(size=(2, *x.shape)).astype(np.float32) for k, x in params.items()}
        for _ in range(3)
    ]
    if where == "simulate":
        tx = ef.simulate(rule, 2, AXIS, param_specs=SPECS, model_axes={"model": 2})
        return grads, *steps(tx, params, grads, lambda tree: tree)
    kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2), (AXIS, "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])

    def place(tree: Any, *lead: str) -> Any:
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec)))  # noqa: E731
        return jax.tree.map(put, tree, SPECS)

    with jax.set_mesh(mesh):
        tx = ef.data_parallel(rule, mesh, AXIS, SPECS)
        return grads, *steps(tx, place(params), grads, lambda tree: place(tree, AXIS))


def steps(tx: Any, params: Any, grads: Any, place: Any) -> tuple[Any, Any, Any]:
    state, update, emitted = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(place(g), state, params)
        emitted.append(jax.device_get(updates))
    return emitted, state, update


@pytest.mark.parametrize(
    "where", ["simulate", "auto", pytest.param("explicit", marks=pytest.mark.slow)]
)
def test_every_device_stores_its_slice(where: str) -> None:
    grads, emitted, state, update = split(where)
    e = np.zeros((2, *SPLIT))
    for g, updates in zip(grads, emitted, strict=True):
        p, mean = g["w"] + e, np.zeros(SPLIT)
        for i in range(2):
            for own in (slice(0, 3), slice(3, 6)):
                c = top(p[i][:, own])
                mean[:, own] += c / 2
                e[i][:, own] = quantised(p[i][:, own] - c)
        np.testing.assert_allclose(updates["w"], mean, rtol=1e-5, atol=1e-5)
    stored = state.residual["w"]
    assert isinstance(stored, Stored) and stored.lost.shape == (2, 2)
    if where != "simulate":
        assert stored.message["codes"].words.sharding.spec[:2] == (AXIS, "model")
    if where == "auto":  # in Explicit mode the specs of any state get a None at their end
        assert update._cache_size() == 1


# ---------------------------------------------------------------------------- other workers


def test_another_number_of_workers_keeps_the_mean() -> None:
    """Up to one rounding, on whole and on split leaves; the same number changes no bit."""
    _, _, state, _ = split("simulate")
    rule = ef.error_feedback(TOP, axis_name=AXIS, memory=ef.block_quantize(4, block=BLOCK))
    params = {"w": jnp.zeros(SPLIT), "b": jnp.zeros(WHOLE)}
    for m in (2, 3):
        tx = ef.simulate(rule, m, AXIS, param_specs=SPECS, model_axes={"model": 2})
        new = ef.parallel.change_workers(state, tx.init(params))
        if m == 2:
            jax.tree.map(np.testing.assert_array_equal, new, state)
        old_b, new_b = (np.asarray(Memory.read(s.residual["b"])) for s in (state, new))
        assert new_b.shape == (m, *WHOLE)
        largest = np.abs(old_b).max()
        np.testing.assert_allclose(new_b.mean(0), old_b.mean(0), atol=largest / LEVELS / 2)
        assert new.residual["w"].lost.shape == (m, 2)
        g = {"w": jnp.ones((m, *SPLIT)), "b": jnp.ones((m, *WHOLE))}
        updates, _ = tx.update(g, new, params)
        assert np.isfinite(updates["w"]).all()


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Any) -> None:
    def make() -> Any:  # a new process makes new keys
        memory = ef.block_quantize(4, block=BLOCK, key=5)
        return ef.simulate(ef.ef21(TOP, axis_name=AXIS, memory=memory), 2, AXIS)

    params, g = jnp.zeros(9), jnp.asarray(workers_of((9,))[0][:2])
    tx = make()
    _, state = tx.update(g, tx.init(params), params)
    ef.save(tmp_path / "1", tx, params=params, opt_state=state)
    again = make()
    restored = ef.restore(tmp_path / "1", again, params=params).opt_state
    after = tx.update(g, state, params), again.update(g, restored, params)
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_a_state_may_be_made_inside_a_program() -> None:
    """The key is compared by value there too, where an operation on it would be traced."""
    memory = ef.block_quantize(8, key=11)
    tx = ef.simulate(ef.error_feedback(TOP, axis_name=AXIS, memory=memory), 2, AXIS)
    made = jax.jit(lambda p: tx.init(p))(jnp.zeros(9))
    assert jax.tree.structure(made) == jax.tree.structure(tx.init(jnp.zeros(9)))


def test_query_points_read_a_stored_model() -> None:
    memory = ef.cast("bfloat16", key=1)
    rule = ef.local.cser(ef.identity(), None, 1.0, 3, axis_name=AXIS, memory=memory)
    tx, params, g = ef.simulate(rule, 2, AXIS), jnp.zeros(3), jnp.ones((2, 3))
    _, state = tx.update(g, tx.init(params), params, grads={"cser": g, "params": g})
    np.testing.assert_array_equal(ef.query_points(state, params)["cser"], -g)


def test_rows_without_a_gradient_cost_nothing() -> None:
    """An embedding of which few rows occur: as many stored rows lose nothing, fewer are counted."""
    seen = np.zeros((16, 4), np.float32)
    seen[[3, 8, 11]] = np.arange(12).reshape(3, 4) - 5
    expected = ef.error_feedback(TOP)
    wide = np.asarray(jax.jit(expected.update)(seen, expected.init(seen))[1].residual)
    for k, lost in ((3, 0), (2, 1)):
        policy = ef.per_leaf(lambda path, leaf, k=k: ef.row_top_k(k=k))
        tx = ef.error_feedback(TOP, memory=policy)
        _, state = jax.jit(tx.update)(seen, tx.init(seen))
        dropped = np.abs(wide).sum(1)
        kept = np.asarray(jax.jit(Memory.read)(state.residual))
        norms = np.linalg.norm(wide, axis=1)
        smallest = np.sort(norms[norms > 0])[:lost]
        np.testing.assert_allclose(state.residual.lost, dropped[np.isin(norms, smallest)].sum())
        np.testing.assert_array_equal(kept[kept != 0], wide[kept != 0])
        assert (kept.any(axis=1)).sum() == k


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (ef.power_sgd(1), "memory: PowerSgd is not a stateless compressor"),
        (ef.per_leaf(lambda *_: ef.power_sgd(1)), "memory, at 'w', PowerSgd is not"),
        (ef.random_k(0.1, 0, scaled=True), "memory, at 'w', RandomK makes"),
        (ef.top_k, "memory=<function top_k"),
    ],
    ids=["several workers", "by leaf", "noise", "a function"],
)
def test_what_cannot_store_is_refused(memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ef.error_feedback(TOP, memory=memory).init({"w": jnp.zeros(40)})
