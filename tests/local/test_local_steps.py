"""Local steps of an inner optimizer under an outer one: against NumPy, on meshes, with faults."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef_optax as ef
from tests.feedback.problem import (
    AXIS,
    GAMMA,
    GRADS,
    SIZES,
    START,
    WORKERS,
    close,
    flat,
    per_leaf,
    run,
)
from tests.oracles import compress, repeated
from tests.oracles import run as take
from tests.oracles.local_steps import (
    local_steps,
    nesterov,
    noloco,
    rounded_mean,
    sparse,
    streaming,
)
from tests.parallel.ways import N, workers

pytestmark = pytest.mark.usefixtures("standard_promotion")

TOP2 = per_leaf(compress.top_k(2))
ROUNDS = 14
HEAVY_BALL = functools.partial(optax.sgd, GAMMA, momentum=0.5)
SGD = functools.partial(optax.sgd, GAMMA)


def qsparse():
    """Error feedback of the drifts, applied as they are."""
    rule = ef.error_feedback(ef.top_k(k=2), axis_name=AXIS)
    return ef.local.local_steps(SGD(), 3, optax.chain(rule, optax.scale(-1.0)))


def streamed(fragments: int, delay: int, mixing: float, period: int = 4):
    """Fragments by leaf under Nesterov's momentum, and what they must do."""
    mean = ef.compressed_mean(ef.identity(), axis_name=AXIS)
    outer = optax.chain(mean, optax.sgd(0.6, momentum=0.8, nesterov=True))
    return ef.local.streaming(HEAVY_BALL(), period, outer, fragments, delay=delay, mixing=mixing)


def stream(fragments: int, delay: int, mixing: float, period: int = 4):
    ends = [0, SIZES[0], sum(SIZES)] if fragments == 2 else [0, sum(SIZES)]
    parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    outers = [nesterov(0.6, 0.8) for _ in parts]
    return streaming(GRADS, START, GAMMA, 0.5, period, parts, outers, delay, mixing)


def pairs_of_three(r: int):
    """The pair that meets in round r, from the rule's draw: with three workers, one stays alone."""
    key = jax.random.fold_in(jax.random.key(5), r)
    number = int(jax.random.randint(key, (), 0, 3))
    return [[(1, 2)], [(0, 2)], [(0, 1)]][number]


CASES = {
    "NoLoCo": (
        lambda: ef.local.noloco(HEAVY_BALL(), 2, 5, 0.6, 0.3, mean_every=2, axis_name=AXIS),
        lambda: noloco(GRADS, START, GAMMA, 0.5, 2, 0.6, 0.3, pairs_of_three),
    ),
    "MuLoCo's outer step": (
        lambda: ef.recipes.muloco(
            0.0,
            3,
            outer_rate=0.6,
            outer_momentum=0.5,
            decay=0.8,
            compressor=ef.top_k(k=2),
            inner=HEAVY_BALL(),
            axis_name=AXIS,
        ),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 3, rounded_mean(TOP2, 0.6, 0.5, 0.8)),
    ),
    "Streaming(P = 2, V = 1, alpha = 0.5)": (
        lambda: streamed(2, 1, 0.5),
        lambda: stream(2, 1, 0.5),
    ),
    "Streaming(P = 1, V = 0, alpha = 0) = DiLoCo": (
        lambda: streamed(1, 0, 0.0, 3),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 3, nesterov(0.6, 0.8)),
    ),
    "Streaming(P = 2, V = 3, alpha = 0)": (
        lambda: streamed(2, 3, 0.0),
        lambda: stream(2, 3, 0.0),
    ),
    "DiLoCo": (
        lambda: ef.local.diloco(HEAVY_BALL(), 3, 0.6, 0.8, axis_name=AXIS),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 3, nesterov(0.6, 0.8)),
    ),
    "DiLoCo(H = 1, SGD, 1, 0) = SGD": (
        lambda: ef.local.diloco(SGD(), 1, 1.0, 0.0, axis_name=AXIS),
        lambda: repeated.qsparse_local_sgd(GRADS, lambda x: x, START, GAMMA, 1),
    ),
    "SparseLoCo, senders": (
        lambda: ef.local.sparse_loco(
            HEAVY_BALL(), 3, ef.top_k(k=2), 0.7, decay=0.8, axis_name=AXIS
        ),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 3, sparse(TOP2, 0.7, 0.8, True)),
    ),
    "SparseLoCo, workers": (
        lambda: ef.local.sparse_loco(
            HEAVY_BALL(), 3, ef.top_k(k=2), 0.7, decay=0.8, mean="workers", axis_name=AXIS
        ),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 3, sparse(TOP2, 0.7, 0.8, False)),
    ),
    "SparseLoCo(all, b = 0, workers) = DiLoCo(b = 0)": (
        lambda: ef.local.sparse_loco(
            HEAVY_BALL(), 2, ef.identity(), 0.7, decay=0.0, mean="workers", axis_name=AXIS
        ),
        lambda: local_steps(GRADS, START, GAMMA, 0.5, 2, nesterov(0.7, 0.0)),
    ),
    "local steps(SGD; EF14) = Qsparse-local-SGD": (
        qsparse,
        lambda: repeated.qsparse_local_sgd(GRADS, TOP2, START, GAMMA, 3),
    ),
}


SLOW = {
    "Streaming(P = 2, V = 3, alpha = 0)",
    "SparseLoCo, workers",
    "SparseLoCo(all, b = 0, workers) = DiLoCo(b = 0)",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_local_steps_against_numpy(name: str) -> None:
    """The common model and each worker's own, over several synchronisations, in one scan."""
    make, oracle = CASES[name]
    got, expected = run(ef.simulate(make(), WORKERS, AXIS), ROUNDS), take(oracle(), ROUNDS)
    if name != "NoLoCo":  # whose common model only follows every few steps
        close(got.x, [s.x for s in expected])
    close(got.x[:, None] + flat(got.state.ahead, 2), [s.y for s in expected])


@pytest.mark.slow
def test_noloco_of_two_workers_is_local_steps_under_heavy_ball() -> None:
    mean = ef.compressed_mean(ef.identity(), axis_name="w")
    outer = optax.chain(mean, optax.sgd(0.6, momentum=0.3))
    seen = []
    for tx in (
        ef.local.local_steps(optax.sgd(0.1), 2, outer),
        ef.local.noloco(optax.sgd(0.1), 2, 0, 0.6, 0.3, mean_every=2, axis_name="w"),
    ):
        tx, x, path = ef.simulate(tx, 2, "w"), jnp.zeros(2), []
        state, update = tx.init(x), jax.jit(tx.update)
        for _ in range(8):
            g = ef.query_points(state, x)["params"] - jnp.array([[2.0, 1.0], [6.0, -3.0]])
            updates, state = update(g, state, x)
            x = optax.apply_updates(x, updates)
            path.append(x)
        seen.append(path)
    np.testing.assert_allclose(*seen, rtol=1e-5)


# ---------------------------------------------------------------------------- meshes

SHAPES = {"w": (4, 3), "b": (3,)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((12, 4)), jnp.float32)
TARGET = jnp.asarray(np.random.default_rng(1).standard_normal((12, 3)), jnp.float32)


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def lifted(where: str):
    """AdamW on every worker, 2-bit values of a top-k message under Nesterov's momentum (MuLoCo)."""
    C = ef.compose(ef.sigma_bins(2), ef.top_k(0.3))
    tx = ef.local.diloco(optax.adamw(0.05), 2, compressor=C, decay=0.9, axis_name="data")
    if where == "simulate":
        return ef.simulate(tx, N, "data")
    return ef.data_parallel(tx, workers(where), "data")


def training_step(where: str):
    tx, value_and_grad = lifted(where), ef.worker_value_and_grad(loss, workers(where), "data")

    @jax.jit
    def step(params, state, batch):
        losses, grads = value_and_grad(ef.query_points(state, params), batch)
        updates, state = tx.update(grads["params"], state, params)
        return optax.apply_updates(params, updates), state, losses

    return tx, step


@functools.cache
def trained(where: str):
    """Five steps in a Python loop, and the compiled step; two synchronisations and a half."""
    tx, step = training_step(where)
    params, batch = {name: jnp.full(s, 0.1) for name, s in SHAPES.items()}, (X, TARGET)
    if where != "simulate":
        mesh = workers(where)
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    state = tx.init(params)
    compiled = step.lower(params, state, batch).compile()
    for _ in range(5):
        params, state, losses = compiled(params, state, batch)
    return jax.tree.map(np.asarray, (params, state, losses)), compiled


@pytest.mark.parametrize("where", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_a_mesh_follows_the_simulation_and_sends_at_synchronisations_only(where: str) -> None:
    (got, compiled), (expected, _) = trained(where), trained("simulate")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    report = ef.wire_report(compiled)
    (gather,) = report.collectives
    assert (gather.kind, gather.conditional) == ("gather", True)
    bits = sum(ef.compose(ef.sigma_bins(2), ef.top_k(0.3)).bits(shape) for shape in SHAPES.values())
    assert gather.message_bytes == 4 * (2 + -(-bits // 32))  # with the header of two words


def test_the_inner_optimizers_differ_and_the_outer_one_does_not() -> None:
    tx = lifted("simulate")
    own = tx.worker_axes({name: jnp.zeros(s) for name, s in SHAPES.items()})
    assert all(jax.tree.leaves((own.ahead, own.inner, own.outer[0].residual)))
    assert not any(jax.tree.leaves((own.step, own.outer[1], own.outer[0].exchange)))
    _, state, _ = trained("simulate")[0]
    assert not np.array_equal(*state.inner[0].mu["w"])


# ---------------------------------------------------------------------------- bad gradients


def outer_mean(**options):
    mean = ef.compressed_mean(ef.identity(), axis_name="w")
    return ef.local.local_steps(optax.sgd(0.5), 2, optax.chain(mean, optax.scale(-1.0)), **options)


def pulled(tx, bad: float, at: frozenset[int]):
    """Four steps towards 2 and 6 from 0; worker 1's gradient is ``bad`` in the steps ``at``."""
    x, b = jnp.zeros(1), jnp.array([[2.0], [6.0]])
    state, update = tx.init(x), jax.jit(tx.update)
    for t in range(4):
        g = ef.query_points(state, x)["params"] - b
        g = g.at[1].set(bad) if t in at else g
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
    return float(x[0]), state


@pytest.mark.parametrize("at", [{0}, {1}, {0, 1, 2, 3}])
def test_a_worker_with_a_bad_gradient_leaves_out_its_own_step(at: set[int]) -> None:
    """As if its gradient were zero, also in the step of a synchronisation, and at every step."""
    tx, steps = ef.simulate(outer_mean(), 2, "w"), frozenset(at)
    expected, _ = pulled(tx, 0.0, steps)
    for bad in (np.nan, 1e30):
        got, state = pulled(tx, bad, steps)
        assert got == expected and int(state.step) == 4


def test_all_workers_can_skip_together() -> None:
    tx = ef.simulate(outer_mean(skip_together="w"), 2, "w")
    x, g = jnp.zeros(1), jnp.array([[1.0], [jnp.nan]])
    state = tx.init(x)
    updates, after = tx.update(g, state, x)
    assert not np.any(updates) and not np.any(after.ahead) and int(after.step) == 0


# ---------------------------------------------------------------------------- other workers


@pytest.mark.parametrize(("n", "m"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_another_number_of_workers(n: int, m: int) -> None:
    """Drifts and moments keep their mean between synchronisations; Adam's count goes with them."""
    tx = ef.local.diloco(optax.adam(0.1), 3, compressor=ef.top_k(k=1), axis_name="w")
    old, new, params = ef.simulate(tx, n, "w"), ef.simulate(tx, m, "w"), jnp.zeros(4)
    state, rng = old.init(params), np.random.default_rng(n)
    for _ in range(4):
        g = jnp.asarray(rng.standard_normal((n, 4)), jnp.float32)
        _, state = old.update(g, state, params)
    moved = ef.parallel.change_workers(state, new.init(params))
    assert moved.inner[0].count.tolist() == [4] * m and int(moved.step) == 4
    rows = lambda s: (s.ahead, s.inner[0].mu, s.inner[0].nu, s.outer[0].residual)  # noqa: E731
    for before, after in zip(rows(state), rows(moved), strict=True):
        assert np.any(before) and after.shape == (m, 4)
        np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-6)
    np.testing.assert_array_equal(moved.outer[1][0].trace, state.outer[1][0].trace)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ef.local.local_steps(0.1, 2, optax.sgd(1.0)), TypeError, "inner=0.1"),
        (lambda: ef.local.local_steps(optax.sgd(1.0), 2, None), TypeError, "outer=None"),
        (lambda: ef.local.diloco(optax.sgd(1.0), 0), ValueError, "period=0"),
        (lambda: streamed(5, 0, 0.0), ValueError, "period=4"),
        (lambda: streamed(2, 4, 0.0), ValueError, "delay=4"),
        (
            lambda: ef.local.streaming(
                SGD(), 4, optax.sgd(1.0), 2, fragment_of=lambda path: 2
            ).init({"w": jnp.zeros(1)}),
            ValueError,
            r"fragment_of\('w'\)=2",
        ),
        (lambda: ef.local.diloco(optax.sgd(1.0), 1, momentum=2.0), ValueError, "momentum=2.0"),
        (
            lambda: ef.local.sparse_loco(optax.sgd(1.0), 1, ef.scaled_sign()),
            ValueError,
            "mean_of_senders: compressor ScaledSign does not send indices",
        ),
        (
            lambda: ef.local.sparse_loco(optax.sgd(1.0), 1, ef.top_k(k=1), mean="all"),
            ValueError,
            "mean='all'",
        ),
        (
            lambda: ef.simulate(
                ef.local.local_steps(optax.sgd(0.1), 2, optax.sgd(1.0)), 2, "w"
            ).init(jnp.zeros(3)),
            ValueError,
            "nothing in this chain exchanges",
        ),
    ],
)
def test_bad_arguments(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
