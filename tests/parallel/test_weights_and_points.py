"""Weights of workers, and rules that need gradients at other points on the same batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax._exchange.collectives import all_gather
from ef_optax._exchange.exchange import Exchange, ExchangeState
from ef_optax._numeric.reductions import UNROLL_LIMIT

X = jnp.asarray([[1.0, -2.0, 0.5], [0.25, 4.0, 1.0], [-1.0, 1.0, 8.0]])


def shared_random_k():
    return ef.random_k(0.5, 0, shared_mask=True)


WEIGHTS = np.asarray([0.0, 1.0, 2.5])


@pytest.mark.parametrize("normalize", ["workers", "present"])
@pytest.mark.parametrize(
    "compressor",
    [
        ef.identity,
        ef.scaled_sign,
        lambda: ef.top_k(k=1),
        shared_random_k,
    ],
    ids=["identity", "sign", "top_k", "shared random_k"],
)
def test_aggregate_is_the_weighted_mean_of_what_was_sent(compressor, normalize: str) -> None:
    exchange = Exchange(compressor().codec, "w", normalize)

    def one(x, weight):
        out = exchange(x, exchange.init(x), weight=weight, want=("sent", "residual"))
        return out.aggregate, out.sent, out.residual

    run = jax.jit(jax.vmap(one, axis_name="w", out_axes=(None, 0, 0)))
    aggregate, sent, residual = run(X, jnp.asarray(WEIGHTS, jnp.float32))
    divisor = len(X) if normalize == "workers" else WEIGHTS.sum()
    expected = (WEIGHTS[:, None] * np.asarray(sent)).sum(0) / divisor
    np.testing.assert_allclose(aggregate, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(sent + residual, X, rtol=1e-6)  # sent is never weighted


def test_many_workers_are_averaged_in_a_loop() -> None:
    """More than the sum is unrolled for, each once, with its weight."""
    n = UNROLL_LIMIT + 3
    exchange = Exchange(ef.scaled_sign().codec, "w")
    x = np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)
    weights = np.linspace(0.5, 2, n).astype(np.float32)

    def one(x, weight):
        return exchange(x, exchange.init(x), weight=weight).aggregate

    got = jax.jit(jax.vmap(one, axis_name="w", out_axes=None))(x, weights)
    sent = np.abs(x).mean(1, keepdims=True) * np.where(x < 0, -1, 1)
    np.testing.assert_allclose(got, (weights[:, None] * sent).mean(0), rtol=1e-5)


def test_workers_of_two_axes_are_in_order() -> None:
    """Worker (i, j) of 2 x 3 is number 3 i + j, in weights as in everything that is gathered."""

    def one(x):
        return all_gather(x, ("pod", "data"))

    x = np.arange(6.0).reshape(2, 3)
    inner = jax.vmap(one, axis_name="data", out_axes=None)
    got = jax.jit(jax.vmap(inner, axis_name="pod", out_axes=None))(x)
    assert got.tolist() == [0, 1, 2, 3, 4, 5]


def test_weights_ride_in_the_header(mesh4) -> None:
    """With weights a gathering round stays one transfer."""
    exchange = Exchange(ef.top_k(k=1).codec, "data")

    def one(x):
        weight = jax.lax.axis_index("data").astype(jnp.float32)
        return exchange(x[0], exchange.init(x[0]), weight=weight).aggregate

    mapped = jax.shard_map(
        one, mesh=mesh4, in_specs=jax.P("data"), out_specs=jax.P(), check_vma=False
    )
    compiled = jax.jit(mapped).lower(jnp.ones((4, 6))).compile()
    report = ef.wire_report(compiled)
    assert report.rounds == 1 and report.message_bytes == 4 * (2 + 1 + 1)


@pytest.mark.parametrize("normalize", ["workers", "present"])
def test_two_shot_averages_its_shards_with_the_weights(normalize: str) -> None:
    """Both shots by the definition: row j of each worker by top-1, the servers' shards by sign."""
    shot = ef.exchanges.two_shot(ef.top_k(k=1), ef.scaled_sign()).codec
    exchange = Exchange(shot, "w", normalize)
    x = np.asarray(np.random.default_rng(3).normal(size=(3, 6)), np.float32)

    def one(x, weight):
        out = exchange(x, exchange.init(x), weight=weight, want=("sent",))
        return out.aggregate, out.sent, out.state.codec.residual

    run = jax.jit(jax.vmap(one, axis_name="w", out_axes=(None, 0, 0)))
    aggregate, sent, residual = run(jnp.asarray(x), jnp.asarray(WEIGHTS, jnp.float32))

    rows = x.reshape(3, 3, 2).astype(np.float64)  # (worker, shard, 2)
    kept = np.where(np.abs(rows) == np.abs(rows).max(-1, keepdims=True), rows, 0)
    divisor = 3 if normalize == "workers" else WEIGHTS.sum()
    shards = (WEIGHTS[:, None, None] * kept).sum(0) / divisor
    answers = np.abs(shards).mean(-1, keepdims=True) * np.where(shards < 0, -1, 1)
    np.testing.assert_allclose(sent, kept.reshape(3, 6), rtol=1e-6)
    np.testing.assert_allclose(aggregate, answers.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(residual, shards - answers, rtol=1e-5, atol=1e-6)


def test_the_weights_of_a_two_shot_exchange_cost_a_word_a_shard(mesh4) -> None:
    """Without weights nothing more travels: a row, and two header words beside the answer."""
    exchange = Exchange(ef.exchanges.two_shot(ef.identity()).codec, "data")

    def bytes_of(weighted: bool) -> tuple[int, int]:
        def one(x):
            weight = jax.lax.axis_index("data").astype(jnp.float32) if weighted else None
            return exchange(x[0], exchange.init(x[0]), weight=weight).aggregate

        mapped = jax.shard_map(
            one, mesh=mesh4, in_specs=jax.P("data"), out_specs=jax.P(), check_vma=False
        )
        report = ef.wire_report(jax.jit(mapped).lower(jnp.ones((4, 12))).compile())
        return report.rounds, report.message_bytes

    rounds, plain = bytes_of(False)
    assert (rounds, plain) == (2, 4 * (12 + 3 + 2))
    assert bytes_of(True) == (2, plain + 4 * 4)


def test_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="present"):
        Exchange(ef.identity().codec, "w", "all")


# ---------------------------------------------------------------------------- query points


class DifferenceState(NamedTuple):
    """A rule like MARINA: g <- g + mean C(grad f_i(x) - grad f_i(x_previous))."""

    previous: Any
    own: Any  # a point that differs between workers
    mean: Any
    exchange: ExchangeState

    def points(self, params: Any) -> dict[str, Any]:
        step = jax.tree.map(jnp.subtract, params, self.previous)
        curvature = ef.estimators.HessianVector(params, step)
        return {"previous": self.previous, "own": self.own, "curvature": curvature}


def difference_rule(compressor: ef.Compressor, axis_name: str):
    exchange = Exchange(compressor.codec, axis_name)

    def init_fn(params):
        own = params + jax.lax.axis_index(axis_name).astype(params.dtype)
        return DifferenceState(params, own, jnp.zeros_like(params), exchange.init(params))

    def update_fn(updates, state, params, *, grads, **extra_args):
        del extra_args
        out = exchange(updates - grads["previous"], state.exchange)
        mean = jnp.where(state.exchange.step == 0, updates, state.mean + out.aggregate)
        mean = jax.lax.pmean(mean, axis_name)
        check = grads["own"] + 0 * grads["curvature"]
        new = DifferenceState(params, check, mean, out.state)
        return mean, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


A = np.asarray([1.0, 2.0, 3.0])
BATCH = jnp.arange(1.0, 9.0).reshape(8, 1)


def loss(x, batch):
    """f(x) = mean(b)/2 sum_j a_j x_j^2; gradient mean(b) a x, Hessian mean(b) diag(a)."""
    return jnp.mean(batch) * 0.5 * jnp.sum(jnp.asarray(A, x.dtype) * x * x)


@pytest.mark.parametrize("where", ["simulate", "mesh"])
def test_points_are_evaluated_on_the_same_batch(where: str, mesh4) -> None:
    rule = difference_rule(ef.identity(), "data")
    example = {"grads": dict.fromkeys(("params", "previous", "own", "curvature"), jnp.zeros(3))}
    if where == "simulate":
        place: Any = 4
        tx = ef.simulate(rule, 4, "data", extra_args=example)
    else:
        place = mesh4
        tx = ef.data_parallel(rule, mesh4, "data", extra_args=example)
    x = jnp.ones(3)
    state = tx.init(x)
    assert state.own.shape == (4, 3) and state.previous.shape == (3,)
    value_and_grad = jax.jit(ef.worker_value_and_grad(loss, place, "data"))
    means = np.asarray(BATCH).reshape(4, 2).mean(1)
    for _ in range(3):
        points = ef.query_points(state, x)
        assert sorted(points) == ["curvature", "own", "params", "previous"]
        losses, grads = value_and_grad(points, BATCH)
        np.testing.assert_allclose(losses, means * 0.5 * np.sum(A * np.square(x)), rtol=1e-5)
        for name, point in (("params", x), ("previous", state.previous), ("own", state.own)):
            expected = means[:, None] * A * np.broadcast_to(point, (4, 3))
            np.testing.assert_allclose(grads[name], expected, rtol=1e-5)
        step = np.asarray(x) - np.asarray(state.previous)
        np.testing.assert_allclose(grads["curvature"], means[:, None] * A * step, rtol=1e-5)
        updates, state = tx.update(grads["params"], state, x, grads=grads)
        np.testing.assert_allclose(updates, means.mean() * A * x, rtol=1e-5)  # C = I telescopes
        x = x - 0.05 * updates


def test_accumulation_equals_the_whole_share() -> None:
    ways = [ef.worker_value_and_grad(loss, 2, "data", accumulate=k) for k in (1, 2)]
    whole, parts = jax.jit(lambda x, batch: [way(x, batch) for way in ways])(jnp.ones(3), BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)


def test_aux_and_keys() -> None:
    def noisy(x, batch, key, scale, offset):
        noise = jax.random.normal(key, ())
        aux = {"mean": jnp.mean(batch), "count": jnp.asarray(batch.shape[0]), "noise": noise}
        return jnp.sum(x) * scale + offset, aux

    ways = [
        ef.worker_value_and_grad(noisy, 4, "data", has_aux=True, **options)
        for options in ({}, {"aux_mean": True}, {"accumulate": 2})
    ]

    @jax.jit
    def run(key):
        return [way(jnp.ones(3), BATCH, key, 2.0, ef.PerWorker(jnp.arange(4.0))) for way in ways]

    ((losses, aux), grads), ((_, averaged), _), ((_, parts), _) = run(jax.random.key(0))
    assert losses.tolist() == [6.0, 7.0, 8.0, 9.0] and grads.shape == (4, 3)
    assert len(set(aux["noise"].tolist())) == 4  # the key is folded with the worker
    assert len(set(parts["noise"].ravel().tolist())) == 8  # and with the part of its share
    assert float(averaged["mean"]) == 4.5 and int(averaged["count"]) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ef.worker_value_and_grad(loss, 3, "data")(jnp.ones(3), BATCH), "divisible by 3"),
        (lambda: ef.worker_value_and_grad(loss, 2, "data", accumulate=0), "accumulate=0"),
        (
            lambda: ef.worker_value_and_grad(loss, 4, "data", accumulate=3)(jnp.ones(3), BATCH),
            "accumulate=3",
        ),
    ],
)
def test_bad_batches_are_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
