"""Gossip: against NumPy on a ring and on a line, on meshes, with faults, and its traffic."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from ef_optax._exchange.neighbours import Graph, NeighbourRounds, matchings
from ef_optax.extend import Gather
from tests.oracles import compress, gossip

N, D, GAMMA, AXIS = 4, 6, 0.02, "w"
RNG = np.random.default_rng(3)
FACTORS = RNG.normal(size=(N, D, D))
H = np.stack([A @ A.T / D + 0.2 * np.eye(D) for A in FACTORS])
B = RNG.normal(size=(N, D)) * 3
START = RNG.normal(size=D)
GRADS = [lambda x, H=Hi, b=bi: H @ x - b for Hi, bi in zip(H, B, strict=True)]
OPTIMUM = np.linalg.solve(H.mean(0), B.mean(0))
RING = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]) / 3
LINE = np.array([[4, 2, 0, 0], [2, 2, 2, 0], [0, 2, 2, 2], [0, 0, 2, 4]]) / 6
ONE_WAY = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]) / 2
line = ef.local.metropolis([(0, 1), (2, 1), (2, 3)])
TOP2 = ef.top_k(k=2)
CHOCO = functools.partial(ef.local.choco_sgd, axis_name=AXIS)
BEER = functools.partial(ef.local.beer, axis_name=AXIS)


def run(tx, rounds: int, start=START):
    """Common models, own models and states of every round, in float64 and in one scan."""
    with jax.enable_x64(True):
        lifted, curvature, b = ef.simulate(tx, N, AXIS), jnp.asarray(H), jnp.asarray(B)

        def step(carry, _):
            x, state = carry
            points = ef.query_points(state, x)
            grads = {name: jnp.einsum("nij,nj->ni", curvature, y) - b for name, y in points.items()}
            updates, state = lifted.update(grads["params"], state, x, grads=grads)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, ef.query_points(state, x)["params"], state)

        def whole(x):
            return jax.lax.scan(step, (x, lifted.init(x)), None, length=rounds)[1]

        return jax.tree.map(np.asarray, jax.jit(whole)(jnp.asarray(start)))


def taken(oracle, rounds: int):
    return gossip.Gossip(*map(np.array, zip(*itertools.islice(oracle, rounds), strict=True)))


close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def test_choco_sgd_against_numpy() -> None:
    """On a line, whose matchings are not permutations of all workers; x is the mean at times."""
    tx = CHOCO(optax.sgd(GAMMA, 0.5), TOP2, 0.3, graph=line, mean_every=7)
    x, own, _ = run(tx, 20)
    expected = taken(gossip.choco_sgd(GRADS, compress.top_k(2), START, GAMMA, 0.5, 0.3, LINE), 20)
    close(own, expected.x)
    close(x[[0, 5, 6, 12, 13, 19]], [START, START, *expected.x.mean(1)[[6, 6, 13, 13]]])


def test_beer_against_numpy_and_to_the_optimum() -> None:
    """Tracking is exact, and the models reach the optimum to rounding; CHOCO-SGD does not."""
    _, own, state = run(BEER(optax.sgd(GAMMA), TOP2, 0.1), 4000)
    expected = taken(gossip.beer(GRADS, compress.top_k(2), START, GAMMA, 0.1, RING), 40)
    close(own[:40], expected.x)
    close(state.tracked[:40], expected.v)
    at = np.concatenate([np.tile(START, (1, N, 1)), own[:-1]])
    mean_gradient = np.mean(np.einsum("nij,tnj->tni", H, at) - B, axis=1)
    np.testing.assert_allclose(state.tracked.mean(1), mean_gradient, atol=1e-12)
    assert np.max(np.abs(own[-1] - OPTIMUM)) < 1e-11
    oracle = gossip.choco_sgd(GRADS, compress.top_k(2), START, GAMMA, 0.0, 0.1, RING)
    far = next(itertools.islice(oracle, 3999, None)).x - OPTIMUM
    assert np.sqrt(np.mean(far**2)) > 0.1


def test_choco_on_the_complete_graph_is_sgd() -> None:
    """Without compression and with gamma = 1, every worker's model is that of data parallelism."""
    tx = CHOCO(optax.sgd(GAMMA), ef.identity(), 1.0, graph=ef.local.complete, mean_every=1)
    x, own, _ = run(tx, 20)
    at, expected = START, []
    for _ in range(20):
        at = at - GAMMA * np.mean([g(at) for g in GRADS], axis=0)
        expected.append(at)
    close(x, expected)
    close(own, np.repeat(np.array(expected)[:, None], N, axis=1))


def test_beer_without_compression_is_gradient_tracking() -> None:
    """On a ring in one direction: the weights need not be symmetric."""
    tx = BEER(optax.sgd(GAMMA), ef.identity(), 1.0, graph=ONE_WAY.tolist(), mean_every=None)
    x, own, _ = run(tx, 20)
    expected = taken(gossip.gradient_tracking(GRADS, START, GAMMA, ONE_WAY), 20)
    close(own, expected.x)
    assert np.array_equal(x, np.tile(START, (20, 1)))


def test_gossip_reaches_agreement_and_keeps_the_mean() -> None:
    """Without gradients it is CHOCO-gossip: from models that differ, towards their mean."""
    tx = ef.simulate(
        CHOCO(optax.sgd(0.0), ef.top_k(k=1), 0.2, graph=line, mean_every=None), N, AXIS
    )
    x = jnp.zeros(D)
    state = tx.init(x)._replace(ahead=jnp.asarray(RNG.normal(size=(N, D)), jnp.float32))
    mean, g = state.ahead.mean(0), jnp.zeros((N, D))
    step = lambda s, _: (tx.update(g, s, x)[1], None)  # noqa: E731
    after = jax.jit(lambda s: jax.lax.scan(step, s, None, length=500)[0])(state)
    np.testing.assert_allclose(after.ahead, np.tile(mean, (N, 1)), atol=1e-4)


# ---------------------------------------------------------------------------- graphs


def test_a_worker_weighs_what_it_hears_by_its_own_row() -> None:
    """Where no two workers have the same neighbours, and hearing is not mutual."""
    eye = np.eye(5)
    weights = 0.5 * eye + 0.3 * eye[[1, 2, 0, 4, 3]] + 0.2 * eye[[3, 4, 1, 2, 0]]
    graph = Graph(tuple(map(tuple, weights.tolist())))
    found = np.diag(graph.table[:, 0])
    for number, pairs in enumerate(graph.matchings, 1):
        for source, target in pairs:
            found[target, source] = graph.table[target, number]
    np.testing.assert_array_equal(found, weights)


def test_edges_are_coloured_with_as_few_matchings_as_possible() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        for density in (0.2, 0.6, 1.0):
            joined = rng.random((n, n)) < density
            edges = [(i, j) for i in range(n) for j in range(n) if joined[i, j] and i != j]
            found = matchings(edges, n)
            assert sorted(edge for part in found for edge in part) == sorted(edges)
            for part in found:
                assert all(len({edge[side] for edge in part}) == len(part) for side in (0, 1))
            off = joined & ~np.eye(n, dtype=bool)
            assert len(found) == max(*off.sum(0), *off.sum(1))
    assert [len(matchings([(i, (i + s) % 8) for i in range(8) for s in (1, 7)], 8))] == [2]


def test_graphs() -> None:
    np.testing.assert_allclose(ef.local.ring(4), RING)
    np.testing.assert_allclose(line(4), LINE)
    assert ef.local.ring(1).tolist() == [[1]] and ef.local.ring(2).tolist() == [[0.5] * 2] * 2
    with pytest.raises(ValueError, match=r"edges has \(2, 3\)"):
        line(3)


# ---------------------------------------------------------------------------- meshes, traffic


def loss(w, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["w"] + w["b"]) - y) ** 2)


@functools.cache
def trained(where: str):
    """Six steps of BEER with momentum on a ring of four, and the compiled step."""
    tx = ef.local.beer(optax.sgd(0.1, 0.5), ef.top_k(0.3), 0.3, mean_every=4, axis_name="data")
    kind = jax.sharding.AxisType.Explicit if where == "explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((N,), ("data",), axis_types=(kind,), devices=jax.devices()[:N])
    workers = N if where == "simulate" else mesh
    lift = ef.simulate(tx, N, "data") if where == "simulate" else ef.data_parallel(tx, mesh, "data")
    value_and_grad = ef.worker_value_and_grad(loss, workers, "data")

    @jax.jit
    def step(params, state, batch):
        _, grads = value_and_grad(ef.query_points(state, params), batch)
        updates, state = lift.update(grads["params"], state, params, grads=dict(grads))
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = {"w": jnp.full((4, 3), 0.1), "b": jnp.zeros(3)}
    batch = tuple(jnp.asarray(rng.normal(size=(12, d)), jnp.float32) for d in (4, 3))
    if where != "simulate":
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    state = lift.init(params)
    compiled = step.lower(params, state, batch).compile()
    for _ in range(6):
        params, state = jax.block_until_ready(compiled(params, state, batch))
    return jax.tree.map(np.asarray, (params, state)), compiled


@pytest.mark.slow
@pytest.mark.parametrize("where", ["auto", "explicit"])
def test_a_mesh_follows_the_simulation_and_sends_to_neighbours_only(where: str) -> None:
    (got, compiled), (expected, _) = trained(where), trained("simulate")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    found = ef.wire_report(compiled).collectives
    always = [one for one in found if not one.conditional]
    words = sum(-(-ef.top_k(0.3).bits(shape) // 32) for shape in ((4, 3), (3,)))
    assert [one.kind for one in always] == ["permute"] * 4  # two messages, two neighbours
    assert all(4 * (words - 1) <= one.message_bytes <= 4 * words for one in always)
    assert {one.kind for one in found if one.conditional} == {"reduce"}


def test_a_message_is_counted_for_each_neighbour() -> None:
    rounds = NeighbourRounds(
        None, "workers", None, None, None, graph=Graph(tuple(map(tuple, RING)))
    )
    rounds.drive([iter_of(Gather(jnp.zeros(3)))], [jnp.zeros(3)])
    assert rounds.bits[0] == (2 * 96, 4 * 96)


def iter_of(request):
    """A protocol of one request."""
    yield request


# ---------------------------------------------------------------------------- faults


def quadratic_step(tx, bad):
    """Three steps in which worker 1's gradient is bad in the second one."""
    tx, x, b = ef.simulate(tx, 2, AXIS), jnp.zeros(1), jnp.array([[2.0], [6.0]])
    state, update = tx.init(x), jax.jit(tx.update)
    seen = []
    for t in range(3):
        grads = {name: y - b for name, y in ef.query_points(state, x).items()}
        if t == 1:
            grads = {name: g.at[1].set(bad) for name, g in grads.items()}
        _, state = update(grads["params"], state, x, grads=grads)
        seen.append(state)
    return seen


@pytest.mark.parametrize("bad", [np.nan, pytest.param(1e30, marks=pytest.mark.slow)])
def test_a_worker_with_a_bad_gradient_leaves_it_out_and_loses_nothing(bad: float) -> None:
    """Its model still moves with its neighbours'; BEER catches up with the next good gradient."""
    tx = BEER(optax.sgd(0.1), ef.identity(), 0.5, mean_every=None)
    first, second, third = quadratic_step(tx, bad)
    assert np.array_equal(second.last[1], first.last[1])
    assert not np.array_equal(second.last[0], first.last[0])
    mean_gradient = np.mean(np.asarray(third.last) - np.array([[2.0], [6.0]]))
    np.testing.assert_allclose(np.mean(third.tracked), mean_gradient, rtol=1e-6)


@pytest.mark.slow
def test_another_number_of_workers_keeps_the_mean_model_and_tracks_again() -> None:
    tx = BEER(optax.sgd(0.1), ef.top_k(k=1), 0.3, mean_every=None)
    old, new, x = ef.simulate(tx, 2, AXIS), ef.simulate(tx, 3, AXIS), jnp.zeros(4)
    own = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    state = old.init(x)
    for _ in range(3):
        grads = {name: y - own[:2] for name, y in ef.query_points(state, x).items()}
        _, state = old.update(grads["params"], state, x, grads=grads)
    moved = ef.parallel.change_workers(state, new.init(x))
    np.testing.assert_allclose(moved.ahead.mean(0), state.ahead.mean(0), atol=1e-6)
    grads = {name: y - own for name, y in ef.query_points(moved, x).items()}
    _, after = new.update(grads["params"], moved, x, grads=grads)
    np.testing.assert_allclose(after.tracked, grads["params"], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CHOCO(0.1, TOP2, 0.5), TypeError, "choco_sgd: inner=0.1"),
        (lambda: BEER(None, TOP2), TypeError, "beer: inner=None"),
        (lambda: CHOCO(optax.sgd(0.1), TOP2, 0.0), ValueError, "consensus_rate=0.0"),
        (lambda: BEER(optax.sgd(0.1), TOP2, mean_every=0), ValueError, "mean_every=0"),
        (
            lambda: BEER(optax.sgd(0.1), ef.power_sgd(1)),
            ValueError,
            "PowerSgd makes its message together",
        ),
        (
            lambda: BEER(optax.sgd(0.1), TOP2, graph=[[0.5, 0.6], [0.5, 0.4]]),
            ValueError,
            "rows and columns must sum to 1",
        ),
        (
            lambda: BEER(optax.sgd(0.1), TOP2, graph=np.eye(2)),
            ValueError,
            "parts that never hear of each other",
        ),
        (
            lambda: ef.simulate(BEER(optax.sgd(0.1), TOP2, graph=RING), 3, AXIS).init(jnp.zeros(3)),
            ValueError,
            "graph has 4 rows, but there are 3 workers",
        ),
    ],
)
def test_bad_arguments(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
