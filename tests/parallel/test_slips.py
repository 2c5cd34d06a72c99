"""The commonest slips, and that the error names the cause and the way that works."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax import contrib

import ef_optax as ef

N = 2
W = jnp.ones(3)


def rule(axis_name: Any = "data"):
    return ef.error_feedback(ef.top_k(k=1), axis_name=axis_name)


def other_rule(axis_name: str | None = "data"):
    return ef.ef21(ef.top_k(k=1), axis_name=axis_name)


def chain(axis_name: str | None = "data"):
    return optax.chain(rule(axis_name), optax.sgd(0.1))


def lifted(tx, params=W):
    return ef.simulate(tx, N, "data").init(params)


def losses(loss, workers=N, params=W, **options):
    return ef.worker_value_and_grad(loss, workers, "data", **options)(params, jnp.ones((N, 3)))


def skipping(tx):
    steps = optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)
    return steps.gradient_transformation()


def lookahead():
    return optax.lookahead(chain(), 5, 0.5), optax.LookaheadParams.init_synced(W)


AFTER = r"decides by a worker's own gradient.*optax\.chain\(rule, optax\.contrib\.mechanize"
SLIPS = {
    "axis_name forgotten in the rule": (
        lambda: lifted(chain(None)),
        r"nothing in the chain exchanges over that axis.*error_feedback\(compressor, axis_name='da",
    ),
    "another axis_name in the rule": (
        lambda: lifted(chain("workers")),
        r"a rule in the chain has axis_name='workers', but the workers are along axis_name='data'",
    ),
    "another axis in the loss": (
        lambda: losses(lambda w, x: jax.lax.pmean(jnp.sum(w * x), "workers")),
        r"over another axis \(.*workers.*but the workers are along axis_name='data'",
    ),
    "a lift around a lift": (
        lambda: lifted(ef.simulate(chain(), N, "data")),
        r"already lifted, to 2 workers along axis_name='data'; lift the chain inside once",
    ),
    "a transformation that is not called": (
        lambda: lifted(optax.adam),
        r"is not an Optax transformation, such as optax\.chain\(",
    ),
    "a compressor without a rule": (
        lambda: lifted(optax.chain(ef.top_k(k=1), optax.sgd(0.1))),
        "compressor that is in the chain by itself sends nothing; put it into a rule",
    ),
    "k as a ratio": (lambda: ef.top_k(100), r"ratio=100.*write k=100"),
    "an integer leaf": (
        lambda: lifted(chain(), {"w": W, "n": jnp.zeros((), jnp.int32)}),
        r"params\['n'\] has dtype int32.*equinox\.partition.*nnx\.split",
    ),
    "an integer leaf in a loss": (
        lambda: ef.worker_value_and_grad(lambda p, x: 0.0, N, "data")({"n": jnp.arange(3)}, W[:2]),
        r"params\['n'\] has dtype int32.*no gradient.*equinox\.partition",
    ),
    "a function among the parameters": (
        lambda: lifted(chain(), {"w": W, "act": jnp.tanh}),
        r"params\['act'\] is the function 'tanh', not an array.*equinox\.partition",
    ),
    "a function among the parameters of a loss": (
        lambda: ef.worker_value_and_grad(lambda p, x: 0.0, N, "data")({"act": jnp.tanh}, W[:2]),
        r"params\['act'\] is the function 'tanh', not an array.*equinox\.partition",
    ),
    "a string among the parameters": (
        lambda: lifted(chain(), {"w": W, "mode": "batch"}),
        r"params\['mode'\] is 'batch', not an array",
    ),
    "a compressor that is not called": (
        lambda: ef.error_feedback(ef.top_k, axis_name="data"),
        r"compressor=top_k is a function.*call it with its settings, top_k\(\.\.\.\)",
    ),
    "a loss for each example": (
        lambda: losses(lambda w, x: (x - w) ** 2),
        r"an array of shape \(1, 3\) as the loss.*must be a scalar.*jnp\.mean\(loss\)",
    ),
    "a loss that is not returned": (lambda: losses(lambda w, x: None), "a NoneType as the loss"),
    "has_aux forgotten": (
        lambda: losses(lambda w, x: (jnp.mean(w), {})),
        r"returned a pair.*worker_value_and_grad\(loss_fn, mesh, axis_name, has_aux=True\)",
    ),
    "aux forgotten": (
        lambda: losses(lambda w, x: jnp.mean(w), has_aux=True),
        r"an array of shape \(\), but has_aux=True expects a pair, \(loss, aux\)",
    ),
    "state and parameters exchanged": (
        lambda: ef.simulate(chain(), N, "data").update(jnp.ones((N, 3)), W, {"w": W}),
        r"another tree structure than params.*tx\.update\(grads, state, params\)",
    ),
    "masked around": (
        lambda: lifted(optax.masked(chain(), {"a": True, "b": False}), {"a": W, "b": W}),
        r"updates\['b'\] differs.*per_leaf\(policy\).*optax\.partition",
    ),
    "apply_if_finite around": (lambda: lifted(optax.apply_if_finite(chain(), 5)), AFTER),
    "MultiSteps that skips around": (lambda: lifted(skipping(chain())), AFTER),
    "mechanize around": (lambda: lifted(contrib.mechanize(chain())), AFTER),
    "sam around": (lambda: lifted(contrib.sam(chain(), optax.sgd(0.1))), AFTER),
    "the state of another chain": (
        lambda: ef.simulate(chain(), N, "data").update(
            jnp.ones((N, 3)), lifted(optax.chain(other_rule(), optax.sgd(0.1))), W
        ),
        r"\[0\]\.estimate is there, but not expected; \[0\]\.residual is expected.*its own init",
    ),
    "averaged gradients and no params": (
        lambda: ef.simulate(chain(), 3, "data").update(W, ef.simulate(chain(), 3, "data").init(W)),
        r"grads have no leading worker axis.*worker_value_and_grad",
    ),
    "a loss that is differentiated already": (
        lambda: losses(jax.value_and_grad(lambda w, x: jnp.mean(x - w))),
        r"returned a pair.*pass the loss itself",
    ),
    "several keys": (
        lambda: ef.random_k(0.1, jax.random.split(jax.random.key(0))),
        r"random_k: key has shape \(2,\), but one key is needed, such as key\[0\]",
    ),
    "an axis twice": (
        lambda: rule(("data", "data")),
        r"axis_name=\('data', 'data'\) must be.*a tuple of different names",
    ),
    "a number of NumPy": (lambda: ef.top_k(k=np.int64(3)), r"k=np\.int64\(3\).*number: 3\."),
    "lookahead around": (lambda: lifted(*lookahead()), r"lifted alone.*optax\.lookahead"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_an_error_names_the_slip_and_the_remedy(slip: str, standard_promotion) -> None:
    make, words = SLIPS[slip]
    with pytest.raises((ValueError, TypeError, NameError), match=words):
        make()


ALONE = ef.error_feedback(ef.identity())
NOT_ONE_WORKERS = {
    "the state of another rule": (
        lambda: ALONE.update(W, other_rule(None).init(W)),
        r"\.estimate is there, but not expected; \.residual is expected, but not there",
    ),
    "no state": (lambda: ALONE.update(W, None), r"state does not belong.*\.residual is expected"),
    "gradients of another tree": (
        lambda: ALONE.update({"b": W}, ALONE.init({"a": W})),
        r"\.residual\['a'\] is there, but not expected; \.residual\['b'\] is expected",
    ),
    "gradients of another shape": (
        lambda: ALONE.update(jnp.ones(4), ALONE.init(W)),
        r"\.residual has shape \(3,\), expected \(4,\)",
    ),
    "gradients of all workers, which would be broadcast": (
        lambda: ALONE.update(jnp.ones((N, 3)), ALONE.init(W)),
        r"\.residual has shape \(3,\), expected \(2, 3\).*go to a lifted chain",
    ),
    "a gradient that would be broadcast": (
        lambda: other_rule(None).update(jnp.ones(()), other_rule(None).init(W)),
        r"\.estimate has shape \(3,\), expected \(\)",
    ),
    "gradients of all workers, and a rule without a memory": (
        lambda: ef.compressed_mean(ef.top_k(k=1)).update({"w": jnp.ones((N, 3))}, (), {"w": W}),
        r"updates\['w'\] has shape \(2, 3\), but params\['w'\] has \(3,\).*a lifted chain",
    ),
}


@pytest.mark.parametrize("slip", NOT_ONE_WORKERS)
def test_a_rule_that_is_not_lifted_names_what_does_not_fit(slip: str) -> None:
    make, words = NOT_ONE_WORKERS[slip]
    with pytest.raises(ValueError, match=words):
        make()


def test_another_error_is_raised_as_it_is() -> None:
    with pytest.raises(TypeError, match="a leaf has dtype int32"):
        ALONE.update(jnp.ones(3, jnp.int32), ALONE.init(W))


def test_numbers_of_python_and_arrays_of_numpy_are_gradients_too() -> None:
    """An array in double precision is one in float32, as everywhere in JAX; without a warning."""
    grads = {"a": 2.0, "b": np.full(3, 0.1)}
    updates, state = ALONE.update(grads, ALONE.init(grads))
    assert (updates["a"], state.residual["a"]) == (2.0, 0.0)
    np.testing.assert_array_equal(updates["b"], np.float32([0.1] * 3))


def mesh(kind: AxisType):
    return jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parameters_committed_to_one_device_are_named(kind: AxisType) -> None:
    params = jax.device_put(W, jax.devices()[0])
    with pytest.raises(ValueError, match=r"devices.*those of the mesh.*jax\.device_put\(params"):
        losses(lambda w, x: jnp.mean(x - w) ** 2, mesh(kind), params)


def test_a_simulation_with_some_arrays_on_a_mesh_is_named() -> None:
    on_mesh = jax.device_put(W, jax.NamedSharding(mesh(AxisType.Explicit), jax.P()))
    with pytest.raises(ValueError, match=r"some arguments lie on a mesh.*or none: ef_optax\.simul"):
        losses(lambda w, x: jnp.mean(x - w) ** 2, N, on_mesh)


def run(tx, params, fast, copies: int | None = None):
    """The parameters after some steps; with ``copies`` all workers have the same gradient."""
    state = tx.init(params)
    for t in range(3):
        grads = (fast(params) - 0.5) * (1.0 + t)
        grads = grads if copies is None else jnp.stack([grads] * copies)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(
            lambda first: optax.chain(first, contrib.mechanize(optax.sgd(0.1))),
            marks=pytest.mark.slow,
        ),
        lambda first: optax.chain(first, contrib.sam(optax.sgd(0.1), optax.sgd(0.05))),
        lambda first: optax.chain(first, skipping(optax.sgd(0.1))),
        lambda first: optax.chain(first, optax.apply_if_finite(optax.sgd(0.1), 5)),
        lambda first: optax.lookahead(optax.chain(first, optax.sgd(0.1)), 2, 0.5),
    ],
    ids=["mechanize", "sam", "multi steps", "apply_if_finite", "lookahead"],
)
def test_the_remedies_equal_plain_optax(around, request, standard_promotion) -> None:
    """With the identity as compressor, what the errors recommend is what Optax does alone."""
    dense = ef.simulate(ef.error_feedback(ef.identity(), axis_name="data"), N, "data")
    start, fast = W, lambda params: params
    if request.node.callspec.id == "lookahead":
        start, fast = optax.LookaheadParams.init_synced(W), lambda params: params.fast
    expected = run(around(optax.identity()), start, fast)
    got = run(around(dense), start, fast, copies=N)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
    assert (fast(expected) != fast(start)).any()  # mechanize begins with a factor of 1e-6
