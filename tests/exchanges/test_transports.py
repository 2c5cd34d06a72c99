"""Every codec by every transport: it is refused at construction with the reason, or it works.

What works is held against NumPy. The protocols of all workers are driven by hand, without maps and
collectives, so that one compiled codec serves all transports; the exchange itself is tested beside
it in its own room.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import ef_optax as ef
from ef_optax._bits.fields import exact_bits
from ef_optax._core.codec import Codec
from ef_optax._core.requests import AllToAll, Gather, Gathered, Mean, Permute, Sum
from ef_optax._core.workers import Workers
from ef_optax.compressors.sparse.dct_top_k import DctTopK
from tests.compressors.pool import CASES
from tests.exchanges.pool import EXCHANGES

N, STEP = 2, 3  # workers; the step, in which worker 1 leads

TRANSPORTS: dict[str, Callable[[ef.Compressor], ef.Compressor]] = {
    "gather": ef.exchanges.gather,
    "largest_of_sum": ef.exchanges.largest_of_sum,
    "leader": ef.exchanges.leader,
    "majority": ef.exchanges.majority,
    "mean_of_senders": ef.exchanges.mean_of_senders,
    "reduce": ef.exchanges.reduce,
    "tree": ef.exchanges.tree,
    "two_shot": lambda compressor: ef.exchanges.two_shot(compressor, ef.identity()),
}

FOLLOWED = {
    "top_k",
    "random_k",
    "random_k-scaled",
    "block_top_k",
    "threshold",
    "sampled_top_k",
    "redsync",
    "comp_k",
    "mix_k",
}
MERGED = FOLLOWED | {
    "wangni",
    "compose-bf16-top_k",
    "compose-sign-top_k",
    "compose-qsgd-random_k",
}
TOGETHER = {"random_k-shared", "random_block", "random_block-scaled", "ternary-shared"}
TOGETHER |= {"compose-qsgd-random_block"}


def fits(name: str, transport: str) -> bool:
    """Which pairs there are, written out."""
    if transport == "leader":
        return name in FOLLOWED
    if transport == "mean_of_senders" and name == "dct_top_k":
        return True
    if transport in ("largest_of_sum", "mean_of_senders", "tree"):
        return name in MERGED
    return name not in TOGETHER


########################################################################################
# Workers by hand
########################################################################################


def workers(index: int) -> Workers:
    return Workers(N, np.int32(index), np.int32(STEP), np.uint32(7))


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def gathered(requests: list[Any]) -> list[Any]:
    return [Gathered(stacked([r.message for r in requests]), None, N)] * N


def exchanged(requests: list[Any]) -> list[Any]:
    messages = [jax.tree.map(np.asarray, r.message) for r in requests]
    rows = [[jax.tree.map(lambda x, j=j: x[j], m) for m in messages] for j in range(N)]
    return [Gathered(stacked(own), None, N) for own in rows]


def permuted(requests: list[Any]) -> list[Any]:
    sources = {target: source for source, target in requests[0].pairs}
    zeros = jax.tree.map(np.zeros_like, requests[0].message)
    return [requests[sources[i]].message if i in sources else zeros for i in range(N)]


def averaged(requests: list[Any]) -> list[Any]:
    def mean(*xs: Any) -> np.ndarray:
        return np.mean(np.asarray(xs, np.float64), axis=0).astype(xs[0].dtype)

    return [jax.tree.map(mean, *[r.value for r in requests])] * N


def summed(requests: list[Any]) -> list[Any]:
    def total(*xs: Any) -> np.ndarray:
        return np.sum(np.asarray(xs), axis=0, dtype=xs[0].dtype)

    return [jax.tree.map(total, *[r.value for r in requests])] * N


ANSWERS = {
    Gather: gathered,
    AllToAll: exchanged,
    Permute: permuted,
    Mean: averaged,
    Sum: summed,
}


def exchange(codec: Codec, xs: list[jax.Array]) -> tuple[list[Any], list[list[tuple[type, int]]]]:
    """The workers' outcomes, and kind and bits of what each of them gave in every round."""
    like = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
    states = [codec.init(like, "leaf", N)] * N
    protocols = [codec.protocol(xs[i], states[i], workers(i)) for i in range(N)]
    answers, rounds = [None] * N, []
    while True:
        requests, outcomes = [], []
        for protocol, answer in zip(protocols, answers, strict=True):
            try:
                requests.append(protocol.send(answer))
            except StopIteration as stop:
                outcomes.append(stop.value)
        if outcomes:
            assert len(outcomes) == N, "all workers make the same requests"
            return outcomes, rounds
        payload = [getattr(r, "message", getattr(r, "value", None)) for r in requests]
        rounds.append([(type(r), exact_bits(p)) for r, p in zip(requests, payload, strict=True)])
        answers = ANSWERS[type(requests[0])](requests)


@functools.cache
def compressor_of(name: str) -> ef.Compressor:
    """The compressor, with functions that are compiled once for all transports."""
    codec = CASES[name].make().codec

    kind = type(codec)

    class Compiled(kind):
        encode = jax.jit(kind.encode, static_argnums=0)
        decode = jax.jit(kind.decode, static_argnums=(0, 2))
        decode_mean = jax.jit(kind.decode_mean, static_argnums=(0, 2, 4))
        residual = jax.jit(kind.residual, static_argnums=0)
        support = jax.jit(kind.support, static_argnums=0)

        def __hash__(self):
            return id(self)

        def __eq__(self, other):
            return self is other

    compiled = object.__new__(Compiled)
    for field in dataclasses.fields(codec):
        object.__setattr__(compiled, field.name, getattr(codec, field.name))
    return ef.Compressor(compiled)


########################################################################################
# What comes out, by NumPy
########################################################################################


def inputs(name: str) -> list[jax.Array]:
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.standard_normal(CASES[name].shape), jnp.float32) for _ in range(N)]


def decoded(codec: Codec, x: jax.Array, key: Any) -> np.ndarray:
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return np.asarray(codec.decode(codec.encode(x, key), like))


def of_each(codec: Codec, xs: list[jax.Array]) -> np.ndarray:
    return np.stack([decoded(codec, x, codec.step_key(workers(i))) for i, x in enumerate(xs)])


def mean_of_messages(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    sent = of_each(codec, xs)
    return sent.mean(0), sent


def sign_of_sum(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    sent = of_each(codec, xs)
    return np.sign(sent.sum(0)), sent


def over_senders(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    sent = of_each(codec, xs)
    if isinstance(codec, DctTopK):  # of the coefficients, in two tiles of 6 x 5
        spectra = scipy.fft.dctn(sent.reshape(N, 6, 2, 5), axes=(1, 3), norm="ortho")
        mean = spectra.sum(0) / np.maximum(1, (np.abs(spectra) > 1e-5).sum(0))
        return scipy.fft.idctn(mean, axes=(0, 2), norm="ortho").reshape(6, 10), sent
    return sent.sum(0) / np.maximum(1, (sent != 0).sum(0)), sent


def largest(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Between two workers a tree is one merge, so that both ways keep the same entries."""
    messages = of_each(codec, xs)
    total = messages.sum(0).reshape(-1)
    kept = np.argsort(-np.abs(total), kind="stable")[: codec.count(total.size)]
    applied = np.isin(np.arange(total.size), kept).reshape(xs[0].shape)
    sent = np.where(applied, messages, 0)
    return sent.mean(0), sent


def at_places_of_the_leader(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    chief = STEP % N
    key = codec.step_key(workers(chief))
    x, message = np.asarray(xs[chief]), decoded(codec, xs[chief], key)
    places = message != 0
    factor = np.median(message[places] / x[places])  # d/k, or k'/k, or one
    sent = np.where(places, factor * np.stack(xs), 0)
    return sent.mean(0), sent


def row_by_row(codec: Codec, xs: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """The server is the identity: what the workers sent of each row is averaged as it is."""
    size = xs[0].size
    chunk = -(-size // N)
    sent = []
    for i, x in enumerate(xs):
        key, rows = codec.step_key(workers(i)), np.zeros((N, chunk), np.float32)
        rows.reshape(-1)[:size] = np.asarray(x).reshape(-1)
        own = [
            decoded(codec, jnp.asarray(row), None if key is None else jax.random.fold_in(key, j))
            for j, row in enumerate(rows)
        ]
        sent.append(np.stack(own).reshape(-1)[:size].reshape(x.shape))
    return np.mean(sent, axis=0), np.stack(sent)


ORACLES = {
    "gather": mean_of_messages,
    "largest_of_sum": largest,
    "leader": at_places_of_the_leader,
    "majority": sign_of_sum,
    "mean_of_senders": over_senders,
    "reduce": mean_of_messages,
    "tree": largest,
    "two_shot": row_by_row,
}


########################################################################################
# All pairs
########################################################################################


@pytest.mark.parametrize("name", CASES)
def test_a_pair_that_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    compressor = CASES[name].make()
    kind = type(compressor.codec).__name__
    for transport, carry in TRANSPORTS.items():
        if fits(name, transport):
            assert carry(compressor).codec.inner is compressor.codec
            continue
        reason = f"{transport}: compressor {kind} .*; choose"
        with pytest.raises((TypeError, ValueError), match=reason):
            carry(compressor)


def test_what_is_an_exchange_or_a_policy_itself_takes_no_transport() -> None:
    reason = "per_leaf, scheduled or a transport .around. the result"
    refused = [make for make in EXCHANGES.values() if not make().codec.self_contained]
    assert len(refused) > 15
    for make in refused:
        for carry in TRANSPORTS.values():
            with pytest.raises(TypeError, match=reason):
                carry(make())


# What a transport asks of a codec it asks of its traits, so a few of the codecs stand for all.
QUICK = {"top_k", "scaled_sign", "qsgd"}
TREES = {"largest_of_sum", "tree"}  # see test_exchanges.py
PAIRS = [
    pytest.param(
        name,
        transport,
        marks=() if name in QUICK and transport not in TREES else pytest.mark.slow,
    )
    for name in CASES
    for transport in TRANSPORTS
    if fits(name, transport)
]


@pytest.mark.parametrize(("name", "transport"), PAIRS)
def test_a_pair_that_fits_works(name: str, transport: str) -> None:
    compressor, xs = compressor_of(name), inputs(name)
    carried = TRANSPORTS[transport](compressor).codec
    outcomes, rounds = exchange(carried, xs)
    aggregate, sent = ORACLES[transport](compressor.codec, xs)
    for i, outcome in enumerate(outcomes):
        np.testing.assert_allclose(outcome.aggregate, aggregate, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outcome.sent(), sent[i], rtol=1e-5, atol=1e-6)
        left = np.asarray(xs[i]) - sent[i]
        np.testing.assert_allclose(outcome.residual(), left, rtol=1e-5, atol=2e-6)
        assert not (np.asarray(sent[i]) != 0)[~np.asarray(outcome.support())].any()
    if carried.additive:
        np.testing.assert_allclose(aggregate, sent.mean(0), rtol=1e-5, atol=1e-6)

    # A sum may travel in whole words; what is declared is what the workers give, else to the bit.
    traffic = carried.traffic(CASES[name].shape, "float32", N)
    assert len(traffic) == len(rounds)
    for declared, given in zip(traffic, rounds, strict=True):
        for kind, bits in given:
            assert bits - (31 if kind is Sum else 0) <= declared <= bits
    assert carried.bits(CASES[name].shape) == sum(carried.traffic(CASES[name].shape, "float32", 1))


########################################################################################
# In an exchange
########################################################################################


def test_votes_travel_and_values_are_subtracted() -> None:
    """The mean is that of the senders' signs; they keep what they did not choose."""
    xs = np.array([[4.0, -1.0, 0.5, 0.0], [0.25, -8.0, 2.0, 0.0]], np.float32)
    votes = ef.exchanges.mean_of_senders(ef.top_k(k=2), values=ef.sign())
    assert votes.bits((4,)) == 2 * 2 + 2 + 32  # two positions, two signs, and the word of the sign
    tx = ef.simulate(ef.error_feedback(votes, axis_name="w"), 2, "w")
    out, state = tx.update(jnp.asarray(xs), tx.init(jnp.zeros(4)), jnp.zeros(4))
    assert out.tolist() == [1.0, -1.0, 1.0, 0.0]
    assert state.residual.tolist() == [[0.0, 0.0, 0.5, 0.0], [0.25, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="mean_of_senders: compressor Composed .* plain values"):
        inner = ef.compose(ef.sign(), ef.top_k(k=2))
        ef.exchanges.mean_of_senders(inner, values=ef.sign())


def test_leaves_travel_in_their_own_ways() -> None:
    """Large leaves by shards, middling ones after a leader, small ones dense; in one chain."""
    ways = {
        "large": ef.exchanges.two_shot(ef.top_k(k=4), ef.identity()),
        "middle": ef.exchanges.leader(ef.top_k(k=2)),
        "small": ef.identity(),
    }
    shapes = {"large": (6, 5), "middle": (9,), "small": (3,)}
    rule = ef.error_feedback(ef.per_leaf(lambda path, leaf: ways[path]), axis_name="w")
    tx = ef.simulate(rule, 3, "w")
    rng = np.random.default_rng(0)
    g = {k: rng.standard_normal((3, *s)).astype(np.float32) for k, s in shapes.items()}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    out, state = jax.jit(tx.update)(g, tx.init(params), params)

    rows = g["large"].reshape(3, 3, 10)  # (worker, shard, values)
    ranks = np.argsort(np.argsort(-np.abs(rows), axis=-1), axis=-1)
    np.testing.assert_allclose(
        out["large"].reshape(-1), np.where(ranks < 4, rows, 0).mean(0).reshape(-1), rtol=1e-5
    )
    chosen = np.argsort(-np.abs(g["middle"][0]))[:2]  # worker 0 leads first
    mask = np.isin(np.arange(9), chosen)
    np.testing.assert_allclose(out["middle"], np.where(mask, g["middle"], 0).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.residual["middle"], np.where(mask, 0, g["middle"]))
    np.testing.assert_allclose(out["small"], g["small"].mean(0), rtol=1e-5)


def test_a_state_for_another_number_of_workers_is_refused() -> None:
    rule = ef.error_feedback(ef.exchanges.two_shot(ef.sign()), axis_name="w")
    state = rule.init(jnp.zeros(6))  # outside of the map: for one worker
    with pytest.raises(ValueError, match="shards of 6 values, but 3 workers have shards of 2"):
        jax.vmap(lambda g: rule.update(g, state)[0], axis_name="w")(jnp.ones((3, 6)))


def test_a_transport_goes_around_a_composition_and_not_into_it() -> None:
    inside = ef.exchanges.leader(ef.top_k(0.5))
    for wrap in (
        lambda: ef.compose(ef.cast("bfloat16"), inside),
        lambda: ef.fcc(inside, 2),
        lambda: ef.exchanges.two_shot(inside),
        lambda: ef.exchanges.two_shot(ef.top_k(0.5), inside),
    ):
        with pytest.raises(TypeError, match="TopK by Leader is not a stateless compressor"):
            wrap()
