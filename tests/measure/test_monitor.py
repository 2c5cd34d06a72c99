"""Every statistic of a monitored exchange against NumPy, from states of unmonitored twins."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax._exchange.monitored import costs_of, counted
from ef_optax._exchange.traffic import Bits

N, AXIS, STEPS = 4, "data", 3
PARAMS = {
    "kernel": jnp.zeros((6, 5)),
    "twin": jnp.zeros((5, 6)),  # as many entries as the kernel, so that they are stacked
    "bias": jnp.zeros(3),
    "none": jnp.zeros((0, 2)),
}
LEAVES = ("kernel", "twin", "bias", "none")
EVERYTHING = {"age": True, "dense_mean": True, "conservation": True}


def gradients(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {
        name: jnp.asarray(rng.normal(size=(N, *p.shape)) * (1 + step), jnp.float32)
        for name, p in PARAMS.items()
    }


def run(tx, steps: int = STEPS):
    """All states of a lifted transformation, the first one included."""
    state = tx.init(PARAMS)
    states, update = [state], jax.jit(tx.update)
    for step in range(steps):
        _, state = update(gradients(step), state, PARAMS)
        states.append(state)
        if step == 1:
            traced = update._cache_size()  # on an Explicit mesh the first state has other types
    assert update._cache_size() == traced
    return states


def array(tree, names) -> np.ndarray:
    """The leaves of these names side by side, (N, entries); sums and differences round in them."""
    return np.concatenate([np.asarray(tree[n]).reshape(N, -1) for n in names], 1)


def expected(g, p, c, e, largest: float, alpha: float, bits: int) -> dict[str, float]:
    """The statistics by their definitions; the arrays are (workers, entries)."""
    n, d = p.shape
    g, p, c, e = (x.astype(np.float64) for x in (g, p, c, e))
    r = p - c
    square = lambda x: np.sum(x * x) / n  # noqa: E731
    return {
        "gradient_norm": math.sqrt(square(g)),
        "input_norm": math.sqrt(square(p)),
        "message_norm": math.sqrt(square(c)),
        "residual_norm": math.sqrt(square(e)),
        "residual_to_gradient": math.sqrt(square(e) / square(g)),
        "residual_zeros": np.mean(e == 0),
        "relative_error": math.sqrt(square(r) / square(p)),
        "alpha_hat": 1 - square(r) / square(p),
        "alpha_promised": alpha,
        "phi": np.mean(np.sum(np.abs(p), 1)) ** 2 / (d * square(p)),
        "message_cosine": np.sum(p * c) / n / math.sqrt(square(p) * square(c)),
        "values_ratio": d * n / np.count_nonzero(c),
        "bits_ratio": 32 * d / bits,
        "message_bytes": STEPS * bits / 8,
        "link_bytes": STEPS * 2 * (N - 1) * bits / 8,
        "lemma3_ratio": alpha**2 * square(e) / (4 * (1 - alpha) * largest),
    }


def by_definition(
    states, codec: ef.extend.Codec, estimate: bool, names, parts=lambda name: [PARAMS[name].shape]
) -> dict[str, float]:
    """What the summary should say about these leaves after the last of these unmonitored states.

    ``parts`` has the shapes of the slices of a leaf.
    """
    before, after = states[-2], states[-1]
    g = array(gradients(STEPS - 1), names)
    if estimate:
        p = g - array(before.estimate, names)
        e = g - array(after.estimate, names)
        c = p - e
    else:
        p = g + array(before.residual, names)
        e = array(after.residual, names)
        c = p - e
    shapes = [shape for n in names if PARAMS[n].size for shape in parts(n)]
    alpha = min(codec.alpha(s, N) for s in shapes)
    bits = sum(codec.bits(s) for s in shapes)
    per_leaf = [
        max(np.sum(array(gradients(t), [n]) ** 2, 1)[i] for t in range(STEPS))
        for i in range(N)
        for n in names
    ]
    return expected(g, p, c, e, sum(per_leaf) / N, alpha, bits)


def compare(found: dict[str, float], wanted: dict[str, float], suffix: str = "") -> None:
    for name, value in wanted.items():
        assert found[f"{name}{suffix}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name


TYPES = jax.sharding.AxisType
MESHES = {"simulated": None, "auto": TYPES.Auto, "explicit": TYPES.Explicit}
TOP, SIGN = ef.top_k(0.3), ef.scaled_sign()
RULES = {
    "error_feedback": lambda: ef.error_feedback(TOP, axis_name=AXIS),
    "ef21": lambda: ef.ef21(SIGN, axis_name=AXIS),
}


@functools.cache
def bare(rule: str):
    """The states of the rule without a monitor, simulated."""
    return run(ef.simulate(RULES[rule](), N, AXIS))


def lifted(tx, mode: str):
    if MESHES[mode] is None:
        return ef.simulate(tx, N, AXIS)
    mesh = jax.make_mesh((N,), (AXIS,), (MESHES[mode],), devices=jax.devices()[:N])
    return ef.data_parallel(tx, mesh, AXIS)


def what_is_asked_for(states) -> dict[str, float]:
    """The statistics that are recorded on request, of error feedback."""
    inputs = [array(gradients(t), LEAVES) + array(states[t].residual, LEAVES) for t in range(STEPS)]
    sent = [p - array(states[t + 1].residual, LEAVES) for t, p in enumerate(inputs)]
    mean, aggregate = inputs[-1].mean(0), sent[-1].mean(0)
    norm = np.linalg.norm
    age = np.zeros_like(inputs[0])
    for c in sent:
        age = np.where(c != 0, 0, age + 1)
    return {
        "aggregate_cosine": mean @ aggregate / norm(mean) / norm(aggregate),
        "aggregate_norm": norm(aggregate),
        "aggregate_error": norm(aggregate - mean) / norm(mean),
        "age_mean": age.mean(),
        "age_max": age.max(),
        "conservation_error": 0.0,
    }


@pytest.mark.parametrize(
    "mode", ["simulated"] + [pytest.param(m, marks=pytest.mark.slow) for m in ("explicit", "auto")]
)
def test_error_feedback(mode: str) -> None:
    states = bare("error_feedback")
    tx = lifted(ef.monitor(RULES["error_feedback"](), **EVERYTHING), mode)
    state = run(tx)[-1]
    np.testing.assert_array_equal(state.residual["kernel"], states[-1].residual["kernel"])
    found = ef.measure.summary(state, by="leaf")
    compare(found, by_definition(states, TOP.codec, False, LEAVES) | what_is_asked_for(states))
    for name in ("kernel", "twin", "bias"):
        compare(found, by_definition(states, TOP.codec, False, [name]), f"/{name}")
    assert "alpha_hat/none" not in found and "nan" not in map(str, found.values())
    assert (found["steps"], found["skipped_steps"]) == (STEPS, 0)


def test_what_is_recorded_now_and_then() -> None:
    """Every third exchange: the bytes and ages are of all, the sums of the last recorded one."""
    options, steps = {"age": True, "dense_mean": True}, 5
    always = run(ef.simulate(ef.monitor(RULES["error_feedback"](), **options), N, AXIS), steps)
    some = ef.simulate(ef.monitor(RULES["error_feedback"](), every=3, **options), N, AXIS)
    state = run(some, steps)[-1]
    np.testing.assert_array_equal(state.residual["kernel"], always[-1].residual["kernel"])
    found, last, recorded = (ef.measure.summary(s) for s in (state, always[-1], always[4]))
    of_all = {"steps", "skipped_steps", "message_bytes", "link_bytes", "age_mean", "age_max"}
    of_memory = {"residual_norm", "residual_zeros"}
    mixed = {"residual_to_gradient", "lemma3_ratio"}
    assert set(found) == set(last) and recorded["relative_error"] != last["relative_error"]
    for name in set(found) - mixed:
        wanted = last if name in of_all | of_memory else recorded
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("mode", "every"), [("simulated", 1), pytest.param("mesh", 2, marks=pytest.mark.slow)]
)
def test_leaves_that_are_split_over_a_model_axis(mode: str, every: int) -> None:
    """The sums are those of whole leaves; bits and promises are those of the slices."""
    specs = {"kernel": P("model"), "twin": P(None, "model"), "bias": P(), "none": P()}
    mesh = jax.make_mesh((N, 2), (AXIS, "model"), (TYPES.Auto,) * 2)

    def lift(tx):
        if mode == "simulated":
            return ef.simulate(tx, N, AXIS, param_specs=specs, model_axes={"model": 2})
        return ef.data_parallel(tx, mesh, AXIS, param_specs=specs)

    states = run(
        ef.simulate(RULES["error_feedback"](), N, AXIS, param_specs=specs, model_axes={"model": 2})
    )
    state = run(lift(ef.monitor(RULES["error_feedback"](), **EVERYTHING, every=every)))[-1]
    found = ef.measure.summary(state, by="leaf")
    shapes = {"kernel": [(3, 5)] * 2, "twin": [(5, 3)] * 2, "bias": [(3,)], "none": [(0, 2)]}
    wanted = by_definition(states, TOP.codec, False, LEAVES, shapes.get)
    if every > 1:
        del wanted["lemma3_ratio"]  # its largest gradient is that of the recorded exchanges
    compare(found, wanted | what_is_asked_for(states))


def test_an_estimate_and_groups() -> None:
    """Without a residual, the memory is the gradient minus the estimate; groups pool leaves."""
    states = bare("ef21")
    state = run(ef.simulate(ef.monitor(RULES["ef21"]()), N, AXIS))[-1]
    assert state.exchange.monitor.age == state.exchange.monitor.dense == ()
    group = {"kernel": "matrices", "twin": "matrices"}
    found = ef.measure.summary(state, by=lambda path: group.get(path, "others"))
    for names, suffix in ((LEAVES, ""), (("kernel", "twin"), "/matrices"), (("bias",), "/others")):
        wanted = by_definition(states, SIGN.codec, True, names)
        del wanted["lemma3_ratio"], wanted["residual_zeros"]
        compare(found, wanted, suffix)
    assert not any("lemma3" in name for name in found)
    traced = jax.jit(lambda s: ef.measure.statistics(s, by="leaf"))(state)
    exact = ef.measure.summary(state, by="leaf")
    for name, value in exact.items():
        assert float(traced[name]) == pytest.approx(value, rel=2e-5), name
    assert {n for n, x in traced.items() if not np.isnan(x)} == set(exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ef.power_sgd(1), id="sums"),
        pytest.param(lambda: ef.exchanges.two_shot(SIGN), id="rows"),
    ],
)
def test_bytes_are_those_of_the_compiled_program(make, mesh4) -> None:
    """All but the header and the padding to a word, for sums, gathers and exchanges of rows."""
    tx = ef.data_parallel(ef.monitor(ef.error_feedback(make(), axis_name=AXIS)), mesh4, AXIS)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update).lower(gradients(0), state, PARAMS).compile()
    _, state = step(gradients(0), state, PARAMS)
    found, report = ef.measure.summary(state), ef.wire_report(step)
    slack = 4 * (2 + N) * report.rounds  # two words of header, and padding to a word of each row
    assert 0 <= report.message_bytes - found["message_bytes"] <= slack
    assert 0 <= report.link_bytes - found["link_bytes"] <= 2 * (N - 1) * slack


def test_a_schedule_counts_what_each_phase_sends() -> None:
    tx = ef.monitor(ef.error_feedback(ef.scheduled([2], [SIGN, ef.identity()])))
    state, update, seen = tx.init(jnp.zeros(64)), jax.jit(tx.update), []
    for _ in range(3):
        _, state = update(jnp.ones(64), state)
        seen.append(ef.measure.summary(state))
    assert [x["message_bytes"] for x in seen] == [12, 24, 24 + 256]
    assert seen[2]["bits_ratio"] == 1 and seen[2]["alpha_promised"] == 1
    assert seen[1]["alpha_promised"] == pytest.approx(1 / 64)


def test_counters_carry_into_the_second_word() -> None:
    words = jnp.asarray([[0xFFFFFFF0, 1, 7, 0], [1, 2, 3, 4]], jnp.uint32)
    costs = costs_of([Bits((3 << 32) + 32, 1), Bits(1, 1)], [None, None])
    assert counted(words, costs.bits).tolist() == [[16, 5, 8, 0], [2, 2, 4, 4]]


@pytest.mark.slow
def test_two_exchanges_are_named_and_a_bad_step_leaves_the_record() -> None:
    rule = ef.double_squeeze(TOP, SIGN, axis_name=AXIS)
    tx = ef.simulate(ef.monitor(rule), N, AXIS)
    state = run(tx, 2)[-1]
    before = ef.measure.summary(state)
    assert {"uplink/alpha_hat", "downlink/alpha_hat"} <= set(before)
    norm = np.linalg.norm(np.concatenate([np.ravel(x) for x in state.server_residual.values()]))
    assert before["downlink/residual_norm"] == pytest.approx(float(norm), rel=1e-5)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), gradients(2))
    _, state = tx.update(bad, state, PARAMS)
    after = ef.measure.summary(state)
    assert after.pop("uplink/skipped_steps") == after.pop("downlink/skipped_steps") == 1
    assert after.items() <= before.items()


def test_what_is_dropped_and_rounded_is_counted() -> None:
    """A stored residual that decays: each loses mass of its own; no memory has no residual."""
    rule = ef.error_feedback(TOP, memory=ef.cast("bfloat16", key=0))
    tx = ef.monitor(ef.policies.steer_residual(rule, retention=0.5))
    params, update = jnp.zeros(20), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(2):
        _, state = update(jnp.asarray(np.random.default_rng(step).normal(size=20), "f4"), state)
    found = ef.measure.summary(state)
    inner, p_one = state.rule, state.rule.exchange.monitor.moments[0, 1]
    assert found["dropped_mass"] == pytest.approx(float(state.dropped)) and state.dropped > 1
    assert found["dropped_share"] == pytest.approx(float(state.dropped) / 2 / float(p_one))
    assert (
        found["rounded_mass"] == pytest.approx(float(inner.residual.lost)) and found["rounded_mass"]
    )
    kept = np.linalg.norm(np.asarray(inner.residual.wide()))
    assert found["residual_norm"] == pytest.approx(float(kept), rel=1e-5)
    bare = ef.monitor(ef.compressed_mean(TOP))
    found = ef.measure.summary(bare.update(jnp.ones(20), bare.init(params))[1])
    assert found["relative_error"] > 0 and "residual_norm" not in found


def test_refusals() -> None:
    rule = ef.error_feedback(TOP, axis_name=AXIS)
    with pytest.raises(ValueError, match="put the monitor inside"):
        ef.monitor(ef.simulate(rule, N, AXIS))
    with pytest.raises(TypeError, match="not an Optax transformation"):
        ef.monitor(rule.update)
    with pytest.raises(ValueError, match="age"):
        ef.monitor(rule, age=1)
    with pytest.raises(ValueError, match="ef_optax.monitor"):
        ef.measure.summary(ef.simulate(rule, N, AXIS).init(PARAMS))
