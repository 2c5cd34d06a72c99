"""For any chain: which state leaves differ between workers, and refusals of what cannot work.

Nearly everything here is traced, not run: a mistake must appear at trace time, never as a hang.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax._exchange.collectives import agreed_cond, psum

N = 4
PARAMS = {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}


@pytest.fixture(autouse=True)
def dtypes(standard_promotion):
    """Optax mixes dtypes in Adam, Adafactor and others."""


def feedback(k=2):
    return ef.error_feedback(ef.top_k(k=k), axis_name="data")


def own_key():
    """A key that differs between workers from ``init`` on."""

    def init(params):
        del params
        return {"key": jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data"))}

    def update(updates, state, params=None):
        del params
        return updates, {"key": jax.random.split(state["key"])[0]}

    return optax.GradientTransformation(init, update)


def injected(learning_rate, k):
    return optax.chain(feedback(k), optax.sgd(learning_rate, momentum=0.9))


HALF = {"w": True, "b": False}
# name -> (chain, the fields whose leaves differ between workers)
CHAINS = {
    "local momentum, Adam": (
        lambda: optax.chain(optax.trace(0.9), feedback(), optax.scale_by_adam()),
        {"trace", "residual"},
    ),
    "Adam before": (
        lambda: optax.chain(optax.scale_by_adam(), feedback()),
        {"mu", "nu", "residual"},
    ),
    "clip and noise before": (
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_noise(0.1, 0.5, 0),
            feedback(),
            optax.lamb(0.1),
        ),
        {"residual"},
    ),
    "key from init": (lambda: optax.chain(own_key(), feedback()), {"key", "residual"}),
    "lion": (
        lambda: optax.chain(optax.scale_by_lion(), feedback(), optax.scale_by_learning_rate(0.1)),
        {"mu", "residual"},
    ),
    "adafactor": (lambda: optax.chain(feedback(), optax.adafactor(0.1)), {"residual"}),
    "injected schedule": (
        lambda: optax.inject_hyperparams(injected, static_args=("k",))(
            learning_rate=optax.linear_schedule(1.0, 0.1, 9), k=2
        ),
        {"residual"},
    ),
    "injected constant": (
        lambda: optax.inject_hyperparams(injected, static_args=("k",))(learning_rate=0.1, k=2),
        {"residual"},
    ),
    "Muon before, which masks and partitions": (
        lambda: optax.chain(optax.contrib.muon(0.1), feedback()),
        {"mu", "nu", "residual"},
    ),
    "flattened feedback": (
        lambda: optax.chain(optax.trace(0.9), optax.flatten(feedback()), optax.adam(0.1)),
        {"trace", "residual"},
    ),
    "flattened whole": (
        lambda: optax.flatten(optax.chain(optax.trace(0.9), feedback(), optax.adam(0.1))),
        {"trace", "residual"},
    ),
    "masked after": (
        lambda: optax.chain(feedback(), optax.masked(optax.adam(0.1), HALF)),
        {"residual"},
    ),
    "partition after": (
        lambda: optax.chain(
            feedback(), optax.partition({True: optax.adam(0.1), False: optax.sgd(0.1)}, HALF)
        ),
        {"residual"},
    ),
    "MultiSteps after": (
        lambda: optax.chain(
            feedback(), optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
        ),
        {"residual"},
    ),
    "apply_if_finite after": (
        lambda: optax.chain(feedback(), optax.apply_if_finite(optax.adam(0.1), 2)),
        {"residual"},
    ),
    "schedule_free around": (
        lambda: optax.contrib.schedule_free(
            optax.chain(feedback(), optax.sgd(0.1)), learning_rate=0.1
        ),
        {"residual"},
    ),
    "schedule_free after": (
        lambda: optax.chain(feedback(), optax.contrib.schedule_free_sgd(0.1)),
        {"residual"},
    ),
    "two exchanges": (
        lambda: optax.chain(
            feedback(), optax.trace(0.9), ef.compressed_mean(ef.identity(), axis_name="data")
        ),
        {"residual"},
    ),
    "no memory at all": (
        lambda: ef.compressed_mean(ef.random_k(0.5, key=0), axis_name="data"),
        set(),
    ),
}


def true_paths(flags):
    located = jax.tree_util.tree_leaves_with_path(flags)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, own in located if own}


def field_paths(flags, fields):
    located = jax.tree_util.tree_leaves_with_path(flags)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in located}
    return {path for path in paths if fields & set(path.split("/"))}


@pytest.mark.parametrize("name", CHAINS)
def test_exactly_the_leaves_that_differ_are_found(name, mesh4):
    make, fields = CHAINS[name]
    flags = ef.parallel.worker_axes(make(), PARAMS, "data", N)
    assert true_paths(flags) == field_paths(flags, fields)
    for field in fields:
        assert field_paths(flags, {field}), f"no leaf is called {field}"
    simulated = ef.simulate(make(), N, "data")
    lifted = ef.data_parallel(make(), mesh4, "data")
    assert simulated.worker_axes(PARAMS) == flags == lifted.worker_axes(PARAMS)
    specs = lifted.state_specs(PARAMS)
    jax.tree.map(
        lambda spec, own: spec == (P("data") if own else P()) or pytest.fail(), specs, flags
    )


@pytest.mark.parametrize("name", CHAINS)
def test_the_state_looks_the_same_after_every_step(name):
    """Structure, shapes and dtypes, so that it scans; per-worker leaves have one row a worker."""
    tx = ef.simulate(CHAINS[name][0](), N, "data")
    flags = tx.worker_axes(PARAMS)
    state = tx.abstract_state(PARAMS)
    jax.tree.map(lambda x, own: not own or x.shape[0] == N or pytest.fail(), state, flags)
    grads = jax.tree.map(lambda p: jnp.ones((N, *p.shape)), PARAMS)
    updates, after = jax.eval_shape(tx.update, grads, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    look = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert look(after) == look(state)
    assert look(updates) == look(PARAMS)


def test_an_extra_argument_that_the_update_needs_is_given_as_an_example():
    tx = optax.chain(feedback(), optax.contrib.reduce_on_plateau())
    flags = ef.parallel.worker_axes(tx, PARAMS, "data", N, extra_args={"value": 0.0})
    assert true_paths(flags) == field_paths(flags, {"residual"})
    lifted = ef.simulate(tx, N, "data", extra_args={"value": 0.0})
    grads = jax.tree.map(lambda p: jnp.ones((N, *p.shape)), PARAMS)
    state = lifted.abstract_state(PARAMS)
    jax.eval_shape(lambda g, s: lifted.update(g, s, PARAMS, value=jnp.ones(())), grads, state)


def test_two_worker_axes():
    tx = ef.error_feedback(ef.top_k(k=2), axis_name=("pod", "data"))
    flags = ef.parallel.worker_axes(tx, PARAMS, ("pod", "data"), (2, 3))
    assert true_paths(flags) == field_paths(flags, {"residual"})
    state = ef.simulate(tx, (2, 3), ("pod", "data")).abstract_state(PARAMS)
    assert state.residual["w"].shape == (6, 3, 4)


########################################################################################
# Trees of every kind
########################################################################################

TREES = {
    "empty": {},
    "nothing but None": {"a": None},
    "None": {"a": None, "b": np.ones(3, np.float32)},
    "zero-size": {"z": np.ones((0, 3), np.float32), "b": np.ones(3, np.float32)},
    "scalars": {"s": np.float32(1.0), "t": (np.float32(2.0),)},
    "mixed dtypes": {"h": jnp.ones(3, jnp.bfloat16), "f": np.ones(3, np.float32)},
    "a bare array": np.ones(3, np.float32),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_of_every_kind(name):
    params = TREES[name]
    chain = optax.chain(optax.trace(0.9), feedback(k=1), optax.sgd(0.1, momentum=0.9))
    tx = ef.simulate(chain, 2, "data")
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jnp.ones((2, *p.shape), p.dtype), params)
    updates, after = tx.update(grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (u.shape, u.dtype) == (p.shape, p.dtype)
        sent = np.asarray(u, np.float32)
        assert np.count_nonzero(sent) == min(1, u.size)
        np.testing.assert_allclose(sent[sent != 0], -0.1, rtol=4e-3)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_keys_folded_with_the_worker_in_init_differ():
    state = ef.simulate(optax.chain(own_key(), feedback()), N, "data").init(PARAMS)
    keys = jax.random.key_data(state[0]["key"])
    assert len(np.unique(np.asarray(keys), axis=0)) == N


########################################################################################
# On a mesh: one compile, whatever comes along
########################################################################################


def test_three_steps_compile_once(mesh4):
    """Also with unexpected extra arguments; the state keeps its types and its placement."""
    tx = ef.data_parallel(CHAINS["local momentum, Adam"][0](), mesh4, "data")
    traces = []

    @jax.jit
    def step(params, state, grads, value):
        traces.append(1)
        updates, state = tx.update(grads, state, params, value=value, nobody_expects=value)
        return optax.apply_updates(params, updates), state

    start = {**PARAMS, "empty": np.ones((0, 3), np.float32)}  # XLA chooses its placement
    params = jax.device_put(start, jax.NamedSharding(mesh4, P()))
    state = tx.init(params)
    abstract = tx.abstract_state(params)
    for t in range(3):
        grads = jax.tree.map(lambda p, t=t: np.full((N, *p.shape), t + 1.0, np.float32), start)
        params, state = jax.block_until_ready(step(params, state, grads, float(t)))
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    assert len(traces) == 1 and step._cache_size() == 1


def test_eager_updates_trace_once():
    traces = []

    def count(updates, params):
        del params
        traces.append(1)
        return updates

    tx = ef.simulate(optax.chain(feedback(), optax.stateless(count)), 2, "data")
    state = tx.init({"b": jnp.ones(4)})
    for value in (1.0, 2.0, 3.0):
        before = len(traces)
        grads, params = {"b": jnp.full((2, 4), value)}, {"b": jnp.ones(4)}
        _, state = tx.update(grads, state, params, unexpected=jnp.float32(value))
    assert len(traces) == before


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_map_params(where, mesh4):
    """Optax finds the parameter-like leaves of a lifted state, also next to a second tree."""
    chain = CHAINS["local momentum, Adam"][0]()
    simulated = where == "simulate"
    tx = ef.simulate(chain, N, "data") if simulated else ef.data_parallel(chain, mesh4, "data")
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tx.abstract_state(PARAMS))
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    second = {"w": np.float32(2.0), "b": np.float32(3.0)}
    moved = optax.tree.map_params(
        tx, lambda x, y: x + y, state, second, transform_non_params=lambda x: x
    )
    trace, ef14, adam = moved
    for tree in (trace.trace, ef14.residual, adam.mu, adam.nu):
        assert (tree["w"] == 2).all() and (tree["b"] == 3).all()
    assert adam.count == 0 and ef14.exchange.step == 0


def test_one_lift_serves_two_models(mesh4):
    tx = ef.data_parallel(feedback(), mesh4, "data")
    assert tx.abstract_state(PARAMS).residual["w"].shape == (N, 3, 4)
    assert tx.abstract_state({"other": jnp.ones(2)}).residual["other"].shape == (N, 2)


########################################################################################
# What cannot work is refused, by name
########################################################################################


def cond_on_local(updates, state, params=None):
    """A collective under a predicate that differs between workers: it would hang on devices."""
    del params
    here = jax.lax.axis_index("data") == 0
    mean = lambda u: jax.tree.map(lambda x: psum(x, "data") / N, u)  # noqa: E731
    return jax.lax.cond(here, mean, lambda u: u, updates), state


LEAKS = {
    "exchange inside masked": lambda: optax.masked(feedback(), HALF),
    "apply_if_finite around": lambda: optax.apply_if_finite(
        optax.chain(feedback(), optax.sgd(0.1)), 2
    ),
    "conditionally_transform around": lambda: optax.transforms.conditionally_transform(
        optax.chain(feedback(), optax.sgd(0.1)), lambda step: step < 3
    ),
    "gradient added after": lambda: optax.chain(
        feedback(),
        optax.stateless(lambda u, _: jax.tree.map(lambda x: x * jax.lax.axis_index("data"), u)),
    ),
    "collective under a local condition": lambda: optax.chain(
        optax.GradientTransformation(feedback().init, cond_on_local)
    ),
    "no axis name": lambda: ef.error_feedback(ef.top_k(k=2)),
}


@pytest.mark.parametrize("where", ["simulate", "mesh"])
@pytest.mark.parametrize("name", LEAKS)
def test_updates_that_differ_are_refused_by_name(name, where, mesh4):
    chain = LEAKS[name]()
    simulated = where == "simulate"
    tx = ef.simulate(chain, N, "data") if simulated else ef.data_parallel(chain, mesh4, "data")
    with pytest.raises(ValueError, match=r"updates\['b'\] differs between the workers.*'data'"):
        tx.init(PARAMS)


def test_a_chain_that_exchanges_nothing_says_so(mesh4):
    for tx in (
        ef.simulate(optax.adam(0.1), N, "data"),
        ef.data_parallel(optax.sgd(0.1), mesh4, "data"),
    ):
        with pytest.raises(ValueError, match="nothing in this chain exchanges.*error_feedback"):
            tx.init(PARAMS)


@pytest.mark.parametrize(
    ("shape", "why"), [((4,), "averaged"), ((8, 4), "too many workers"), ((2, 4), "too few")]
)
def test_gradients_of_another_shape_are_refused(shape, why, mesh4):
    del why
    params = {"b": jnp.ones(4)}
    chain = optax.chain(feedback(), optax.sgd(0.1))
    for tx in (ef.simulate(chain, N, "data"), ef.data_parallel(chain, mesh4, "data")):
        state = tx.abstract_state(params)
        with pytest.raises(ValueError) as caught:
            tx.update({"b": jnp.ones(shape)}, state, params)
        text = str(caught.value)
        assert f"grads['b'] has shape {shape}, expected (4, 4)" in text
        assert "worker_value_and_grad" in text


def test_other_wrong_arguments_of_update_are_refused():
    params, tx = {"b": jnp.ones(4)}, ef.simulate(feedback(), N, "data")
    grads, state = {"b": jnp.ones((N, 4))}, tx.abstract_state({"b": jnp.ones(4)})
    with pytest.raises(ValueError, match="another tree structure"):
        tx.update({"c": grads["b"]}, state, params)
    with pytest.raises(ValueError, match=r"value has shape \(3,\), expected \(4, ...\)"):
        tx.update(grads, state, params, value=ef.PerWorker(jnp.ones(3)))
    foreign = state._replace(residual={"b": jnp.ones((2, N, 4))})
    with pytest.raises(ValueError, match=r"\(2, 4, 4\), expected .*does not belong"):
        tx.update(grads, foreign, params)


def test_axis_names_and_counts_are_checked(mesh4):
    with pytest.raises(ValueError, match="axis_name='model' must name axes of the mesh"):
        ef.data_parallel(feedback(), mesh4, "model")
    for count in (0, (2, 2)):
        with pytest.raises(ValueError, match="must give one positive integer for each axis"):
            ef.simulate(feedback(), count, "data")


@pytest.mark.parametrize("around", ["masked", "partition"])
def test_masks_belong_inside_the_lift(around, mesh4):
    lifted = ef.data_parallel(optax.chain(feedback(), optax.sgd(0.1)), mesh4, "data")
    if around == "masked":
        tx = optax.masked(lifted, HALF)
    else:
        tx = optax.partition({True: lifted, False: optax.set_to_zero()}, HALF)
    with pytest.raises(ValueError, match="[Pp]ut it inside"):
        tx.init(PARAMS)


def test_agreed_cond_refuses_a_local_predicate(mesh4):
    def run(x, local):
        pred = x[0] > 0 if local else psum(x[0], "data") > 0
        both = lambda y: jax.lax.psum(y, "data")  # noqa: E731
        return agreed_cond(pred, both, lambda y: 2 * jax.lax.psum(y, "data"), x, axis="data")

    def trace(local):
        mapped = jax.shard_map(
            lambda x: run(x, local), mesh=mesh4, in_specs=P("data"), out_specs=P()
        )
        return jax.eval_shape(mapped, jnp.ones(N))

    assert trace(local=False).shape == (1,)
    with pytest.raises(ValueError, match="differs between the workers of axis 'data'.*reduce it"):
        trace(local=True)


########################################################################################
# Flax
########################################################################################

BATCH = {
    "x": np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(N, 2)).astype(np.float32),
}


def lifted_sgd():
    return ef.simulate(optax.chain(feedback(), optax.sgd(0.1)), N, "data")


def expected(kernel, bias):
    """One step of top-2 with learning rate 0.1 for a linear model, in NumPy."""
    sent = {"kernel": [], "bias": []}
    for x, y in zip(BATCH["x"], BATCH["y"], strict=True):
        delta = x @ kernel + bias - y
        for name, g in (("kernel", np.outer(x, delta)), ("bias", delta)):
            keep = np.argsort(-np.abs(g).ravel(), kind="stable")[:2]
            c = np.zeros(g.size)
            c[keep] = g.ravel()[keep]
            sent[name].append(c.reshape(g.shape))
    return kernel - 0.1 * np.mean(sent["kernel"], 0), bias - 0.1 * np.mean(sent["bias"], 0)


def test_flax_train_state():
    model = nn.Dense(2)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), BATCH["x"])["params"],
        tx=lifted_sgd(),
    )
    start = jax.device_get(state.params)

    def loss(params, batch):
        return 0.5 * jnp.sum((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

    @jax.jit
    def step(state):
        _, grads = ef.worker_value_and_grad(loss, N, "data")(state.params, BATCH)
        return state.apply_gradients(grads=grads)

    after = step(state)
    kernel, bias = expected(start["kernel"], start["bias"])
    np.testing.assert_allclose(after.params["kernel"], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.params["bias"], bias, rtol=1e-5, atol=1e-6)
    assert after.step == 1


def test_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lifted_sgd(), wrt=nnx.Param)
    start = np.asarray(model.kernel[...]), np.asarray(model.bias[...])
    graph, _ = nnx.split(model)

    def loss(params, batch):
        return 0.5 * jnp.sum((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        _, grads = ef.worker_value_and_grad(loss, N, "data")(params, BATCH)
        optimizer.update(model, grads)

    step(model, optimizer)
    kernel, bias = expected(*start)
    np.testing.assert_allclose(model.kernel[...], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.bias[...], bias, rtol=1e-5, atol=1e-6)
