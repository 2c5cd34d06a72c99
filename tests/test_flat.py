"""A model as one vector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from benchmarks.compile_time import kernels_of
from tests.programs import compiled

SHAPES = {"a": (3, 4), "b": (), "c": (0, 2), "d": (3, 4), "e": (17,)}


def gradients(seed: int, workers: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.standard_normal((workers, *s)), "float32") for k, s in SHAPES.items()
    }


QUICK = {("top_k", "simulate"), ("scaled_sign", "devices")}
CODECS = {
    "scaled_sign": ef.scaled_sign,
    "top_k": lambda: ef.top_k(0.2),
    "qsgd": lambda: ef.qsgd(7, 0, bucket=8),
}


@pytest.mark.parametrize(
    ("codec", "how"),
    [
        pytest.param(codec, how, marks=() if (codec, how) in QUICK else pytest.mark.slow)
        for codec in CODECS
        for how in ("simulate", "devices")
    ],
)
def test_it_is_the_flattening_of_optax(codec: str, how: str, mesh4) -> None:
    """Three steps of four workers: updates and states, to the bit."""

    def trajectory(flatten):
        tx = flatten(ef.error_feedback(CODECS[codec](), axis_name="data"))
        tx = (
            ef.simulate(tx, 4, "data") if how == "simulate" else ef.data_parallel(tx, mesh4, "data")
        )
        params = jax.tree.map(lambda x: x[0], gradients(0, 4))
        state, update, out = tx.init(params), jax.jit(tx.update), []
        for seed in range(3):
            updates, state = update(gradients(seed, 4), state, params)
            out.append(updates)
        return out, state

    jax.tree.map(np.testing.assert_array_equal, trajectory(ef.flatten), trajectory(optax.flatten))


def test_leaves_of_several_dtypes_and_none_at_all() -> None:
    tx = ef.flatten(ef.error_feedback(ef.identity()))
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.full(3, 1 + 2.0**-20, jnp.float32)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    assert {k: x.dtype for k, x in updates.items()} == {k: x.dtype for k, x in grads.items()}
    assert tx.update({}, tx.init({}))[0] == {}


def test_parameters_reach_the_inner_transformation_as_one_vector() -> None:
    tx = ef.flatten(optax.chain(ef.error_feedback(ef.identity()), optax.add_decayed_weights(0.5)))
    params = {"a": jnp.array([2.0, 4.0]), "b": jnp.array([[6.0]])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, p / 2), updates, params)


def test_a_leaf_of_integers_is_refused_by_name() -> None:
    tx = ef.flatten(ef.error_feedback(ef.identity()))
    with pytest.raises(TypeError, match=r"layer/steps.*int32.*floating-point"):
        tx.init({"layer": {"steps": jnp.zeros(3, jnp.int32)}})


def test_equal_leaves_share_one_program() -> None:
    """Twelve equal leaves compile to as many different kernels as three do."""

    def different(count: int) -> int:
        tx = ef.flatten(ef.error_feedback(ef.scaled_sign()))
        grads = {str(i): jax.ShapeDtypeStruct((64, 3), jnp.float32) for i in range(count)}
        state = jax.eval_shape(tx.init, grads)
        text = compiled(jax.jit(tx.update).lower(grads, state)).as_text()
        assert text is not None
        # Only the size of the whole vector may differ.
        return len(kernels_of(text.replace(str(192 * count), "whole")))

    assert different(12) == different(3)


@pytest.mark.parametrize("inner", [None, 3, ef.flatten])
def test_what_is_no_transformation_is_refused(inner) -> None:
    with pytest.raises(TypeError, match="flatten: inner=.*not an Optax transformation"):
        ef.flatten(inner)


@pytest.mark.parametrize(
    "how",
    [
        "checked",
        *(pytest.param(h, marks=pytest.mark.slow) for h in ("pmap", "unchecked", "explicit")),
    ],
)
def test_hand_written_maps_give_what_the_simulation_gives(how: str) -> None:
    """Two steps of four workers under the other maps; the bytes are those of one leaf."""
    tx = ef.flatten(ef.error_feedback(ef.scaled_sign(), axis_name="data"))
    params = jax.tree.map(lambda x: x[0], gradients(0, 4))
    simulated = ef.simulate(tx, 4, "data")
    expected, state = [], simulated.init(params)
    for seed in range(2):
        updates, state = simulated.update(gradients(seed, 4), state, params)
        expected.append(updates)

    def local(first, second):
        state, out = tx.init(params), []
        for g in (first, second):
            updates, state = tx.update(jax.tree.map(lambda x: x[0], g), state)
            out.append(updates)
        return out

    if how == "pmap":
        own = [jax.tree.map(lambda x: x[:, None], gradients(seed, 4)) for seed in range(2)]
        mapped = jax.pmap(local, "data", devices=jax.devices()[:4])(*own)
        got = jax.tree.map(lambda x: x[0], mapped)
    else:
        kind = jax.sharding.AxisType.Explicit if how == "explicit" else jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((4,), ("data",), (kind,), devices=jax.devices()[:4])
        check = how != "unchecked"
        step = jax.jit(
            jax.shard_map(
                local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P(), check_vma=check
            )
        )
        own = [
            jax.device_put(gradients(seed, 4), jax.NamedSharding(mesh, jax.P("data")))
            for seed in range(2)
        ]
        got = step(*own)
        size = sum(int(np.prod(s)) for s in SHAPES.values())
        words = 2 + -(-ef.scaled_sign().bits((size,)) // 32)  # two words of header
        report = ef.wire_report(step.lower(*own).compile())
        assert [c.message_bytes for c in report.of("gather").collectives] == [4 * words] * 2
    # Four scales with signs, each below 1, are added in a different order: they may cancel.
    bound = 4 * np.finfo(np.float32).eps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), got, expected)
