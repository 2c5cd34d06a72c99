"""The commonest slips, and that the error names the cause and the way that works."""

from __future__ import annotations

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


def rule(axis_name: str | None = "data"):
    return ef.error_feedback(ef.top_k(k=1), axis_name=axis_name)


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
    "lookahead around": (lambda: lifted(*lookahead()), r"lifted alone.*optax\.lookahead"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_an_error_names_the_slip_and_the_remedy(slip: str, standard_promotion) -> None:
    make, words = SLIPS[slip]
    with pytest.raises((ValueError, TypeError, NameError), match=words):
        make()


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
