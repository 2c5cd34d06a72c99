"""What a loss may be given and give back, the same on meshes of both kinds and in a simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import ef_optax as ef
from tests.parallel.ways import WHERE, N, workers

X = np.arange(8.0, dtype=np.float32).reshape(4, 2)  # two rows a worker


def placed(x, where: str):
    """An array on the devices of the workers."""
    return x if where == "simulate" else jax.device_put(x, NamedSharding(workers(where), P()))


def lifted(tx, where: str, **options):
    place = workers(where)
    if where == "simulate":
        return ef.simulate(tx, place, "data", **options)
    return ef.data_parallel(tx, place, "data", **options)


def gradients(loss, where: str, **options):
    return ef.worker_value_and_grad(loss, workers(where), "data", **options)


def quick(fun, where: str):
    """Compiled as a whole where JAX compiles each operation of an eager map."""
    return fun if where == "explicit" else jax.jit(fun)


@pytest.mark.parametrize("where", WHERE)
def test_aux_of_every_dtype_is_averaged_or_taken_from_the_first(where: str) -> None:
    def loss(w, x, start):
        hits = jnp.sum(x > 2.5, dtype=jnp.int32) + start
        aux = {"mean": x.mean(0), "hits": hits, "any": hits > 1, "rows": hits * jnp.arange(3)}
        return jnp.mean(w * x), aux

    fun = gradients(loss, where, has_aux=True, aux_mean=True)
    for run in {quick(fun, where), jax.jit(fun)}:
        (losses, aux), _ = run(jnp.ones(2), X, placed(jnp.int32(10), where))
        np.testing.assert_allclose(losses, [X[:2].mean(), X[2:].mean()])
        np.testing.assert_allclose(aux["mean"], X.mean(0))
        assert int(aux["hits"]) == 11 and bool(aux["any"])  # worker 0 has one entry above 2.5
        assert aux["rows"].tolist() == [0, 11, 22] and aux["rows"].dtype == jnp.int32


@pytest.mark.parametrize("where", WHERE)
def test_what_is_no_array_is_a_python_value(where: str) -> None:
    def loss(w, x, train, scale, *, layers, power=1.0, norm=None):
        assert isinstance(train, bool) and layers == 2 and scale["name"] == "double"
        x = x * scale["by"] if train else x
        for _ in range(layers):
            x = scale["act"](x)
        return jnp.mean(w * x**power if norm is None else norm(w * x))

    fun = gradients(loss, where)
    scale = {"name": "double", "by": placed(jnp.float32(2.0), where), "act": jnp.abs}
    expected = np.array([X[:2].mean(0), X[2:].mean(0)]) / 2
    for train in (True, False):
        run = quick(lambda w, x, train=train: fun(w, x, train, scale, layers=2), where)
        np.testing.assert_allclose(run(jnp.ones(2), X)[1], expected * (2 if train else 1))
    own = ef.PerWorker(jnp.array([1.0, 3.0]))
    given = {"train": True, "scale": scale, "layers": 2, "power": own, "norm": jnp.square}
    _, grads = quick(functools.partial(fun, **given), where)(jnp.ones(2), X)
    assert grads.shape == (N, 2)


@pytest.mark.parametrize("where", WHERE)
def test_keys_are_folded_wherever_they_are_passed(where: str) -> None:
    def loss(w, x, keys, *, rngs):
        draws = [jax.random.normal(k, ()) for k in (keys["a"], rngs[0])]
        return jnp.sum(w) * x.mean(), jnp.stack(draws)

    keys = jax.random.split(jax.random.key(1))
    fun = quick(gradients(loss, where, has_aux=True), where)
    (_, draws), _ = fun(jnp.ones(2), X, {"a": keys[0]}, rngs=[keys[1]])
    folded = [[jax.random.normal(jax.random.fold_in(k, i), ()) for k in keys] for i in range(N)]
    np.testing.assert_allclose(draws, folded, rtol=1e-6)


KEY = jax.random.key(0)


def of_a_global_key(w, x):
    return jnp.mean(w * x * jax.random.normal(KEY, ()))


class Dropping:
    def __init__(self, key):
        self.key = key

    def loss(self, w, x):
        return jnp.mean(w * x * jax.random.normal(self.key, ()))

    def plain(self, w, x):
        return jnp.mean(w * x)

    __call__ = loss


def test_keys_that_would_be_the_same_on_all_workers_are_seen() -> None:
    def loss(w, x, key):
        return jnp.sum(w) * x.mean() * jax.random.normal(key, ())

    fun = ef.worker_value_and_grad(loss, N, "data")
    with pytest.raises(TypeError, match=r"PRNGKey.*jax.random.key\(seed\).*folded"):
        fun(jnp.ones(2), X, jax.random.PRNGKey(0))
    rows = jax.vmap(jax.random.PRNGKey)(jnp.arange(N))
    fun(jnp.ones(2), X, ef.PerWorker(rows))  # every worker has its own
    key = jax.random.key(0)
    closing = lambda w, x: loss(w, x, key)  # noqa: E731
    around = lambda w, x: closing(w, x)  # noqa: E731
    model = Dropping(key)
    closed = (closing, around, functools.partial(loss, key=key), jax.jit(closing))
    for fun in (*closed, of_a_global_key, model, model.loss):
        with pytest.warns(UserWarning, match="uses a random key that is not an argument.*Pass it"):
            jax.eval_shape(ef.worker_value_and_grad(fun, N, "data"), jnp.ones(2), X)
    # No warning where a key is beside the loss and is not used by it.
    gradients(model.plain, "simulate")(jnp.ones(2), X)


@pytest.mark.parametrize("where", ["auto", "explicit"])
def test_a_loss_may_close_over_what_is_not_on_the_mesh(where: str) -> None:
    base = jnp.array([1.0, 2.0])

    def step(w, base):
        return gradients(lambda w, x: jnp.mean(w * base * x), where)(w, X)[1]

    expected = np.array([X[:2].mean(0), X[2:].mean(0)]) / 2 * np.array([1.0, 2.0])
    on_mesh = placed(base, where)
    for run in {quick(step, where), jax.jit(step)}:
        np.testing.assert_allclose(run(jnp.ones(2), base), expected)
        if where == "auto":
            np.testing.assert_allclose(run(jnp.ones(2), on_mesh), expected)
        else:
            with pytest.raises(ValueError, match=r"not among its arguments.*Pass it.*\*args"):
                run(jnp.ones(2), on_mesh)


########################################################################################
# Extra arguments of update
########################################################################################


def rule():
    return ef.error_feedback(ef.identity(), axis_name="data")


@pytest.mark.parametrize(
    "where", ["simulate", *(pytest.param(w, marks=pytest.mark.slow) for w in ("auto", "explicit"))]
)
def test_functions_are_extra_arguments(where: str) -> None:
    """A line search inside and after the lift takes the step that plain Optax takes."""
    value_fn = lambda w: jnp.sum((w - 1.0) ** 2)  # noqa: E731
    search = optax.scale_by_backtracking_linesearch(10)
    w = jnp.array([4.0, -2.0])
    value, grad = jax.jit(jax.value_and_grad(value_fn))(w)
    given = {"value": value, "grad": grad, "value_fn": value_fn}
    rest = (optax.sgd(1.0), search)
    plain = optax.chain(*rest)
    expected, _ = jax.jit(lambda g, s: plain.update(g, s, w, **given))(grad, plain.init(w))
    inside = lifted(optax.chain(rule(), *rest), where, extra_args=given)
    for tx in (inside, optax.chain(lifted(rule(), where), *rest)):
        update = quick(functools.partial(tx.update, **given), where)
        updates, _ = update(jnp.stack([grad, grad]), tx.init(w), w)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("where", WHERE)
def test_a_missing_extra_argument_points_to_the_example(where: str, standard_promotion) -> None:
    chain = optax.chain(rule(), optax.sgd(0.1), contrib.reduce_on_plateau())
    with pytest.raises(TypeError, match=r"extra argument.*'value'.*extra_args=\{'value': 0.0\}"):
        lifted(chain, where).init(jnp.ones(2))
    tx = lifted(chain, where, extra_args={"value": 0.0})
    updates, _ = tx.update(jnp.ones((N, 2)), tx.init(jnp.ones(2)), jnp.ones(2), value=1.0)
    np.testing.assert_allclose(updates, [-0.1, -0.1], rtol=1e-6)


def test_an_extra_argument_of_each_worker_makes_its_state_differ() -> None:
    def init(params):
        return jnp.zeros_like(params)

    def update(updates, state, params=None, *, scale, mode, **extra):
        del params, extra
        assert mode == "sum"
        return updates, state + scale

    chain = optax.chain(optax.GradientTransformationExtraArgs(init, update), rule())
    example = {"scale": ef.PerWorker(jnp.zeros(N)), "mode": "sum"}
    tx = ef.simulate(chain, N, "data", extra_args=example)
    given = {"scale": ef.PerWorker(jnp.array([1.0, 5.0])), "mode": "sum"}
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.ones((N, 2)), state, jnp.zeros(2), **given)
    assert state[0].tolist() == [[1.0, 1.0], [5.0, 5.0]]
