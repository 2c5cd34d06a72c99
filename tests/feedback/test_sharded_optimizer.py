"""An optimizer split over the workers, against LoCo in the paper's letters, and what it moves."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from ef_optax._exchange.rounds import HEADER_WORDS

pytestmark = pytest.mark.usefixtures("standard_promotion")

N, AXIS, BETA, RATE, MOMENTUM, RESET, STEPS = 4, "data", 0.8, 0.5, 0.9, 3, 5
SHAPES = {"w": (5, 3), "b": (7,)}  # neither is divisible by the workers
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def quantized(x: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Each block in multiples of its largest magnitude over 2^(bits - 1) - 1."""
    out, levels = np.zeros_like(x), 2 ** (bits - 1) - 1
    for start in range(0, x.size, block):
        part = x[start : start + block]
        largest = np.abs(part).max(initial=0.0)
        if largest:
            out[start : start + block] = np.round(part / largest * levels) * largest / levels
    return out


def loco(gradients: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One leaf: the weights of the loop, the exact ones, and e/(1 - beta) of every worker."""
    size = -(-x.size // N)
    shape, pad = x.shape, N * size - x.size
    rows = lambda a: np.pad(a.reshape(-1), (0, pad)).reshape(N, size)  # noqa: E731
    w = x = rows(x)
    e, m = np.zeros((N, N, size)), np.zeros((N, size))
    for t, g in enumerate(gradients):
        h = np.stack([rows(g[i]) for i in range(N)]) + e
        q = np.stack([[quantized(row, 4, 4) for row in h[i]] for i in range(N)])
        e = BETA * e + (1 - BETA) * (h - q)
        if (t + 1) % RESET == 0:
            e = np.zeros_like(e)
        m = MOMENTUM * m + q.mean(0)
        x = x - RATE * m
        w = w + np.stack([quantized(row, 8, 4) for row in x - w])
    out = lambda a: a.reshape(-1)[: math.prod(shape)].reshape(shape)  # noqa: E731
    return out(w), out(x), np.stack([out(one) for one in e]) / (1 - BETA)


def transformation() -> optax.GradientTransformation:
    return ef.recipes.loco(
        optax.sgd(RATE, MOMENTUM),
        beta=BETA,
        reset_every=RESET,
        gradients=ef.block_quantize(4, block=4),
        weights=ef.block_quantize(8, block=4),
        memory="float32",
        axis_name=AXIS,
    )


def mesh_of(kind: str, n: int = N) -> jax.sharding.Mesh:
    return jax.make_mesh((n,), (AXIS,), axis_types=(KINDS[kind],), devices=jax.devices()[:n])


def parameters(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize(
    "where", ["simulate", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_loco_in_the_letters_of_the_paper(where: str) -> None:
    rng = np.random.default_rng(0)
    start = params = parameters(rng)
    grads = [
        {k: rng.standard_normal((N, *s)).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(STEPS)
    ]
    if where == "simulate":
        tx = ef.simulate(transformation(), N, AXIS)
    else:
        tx = ef.data_parallel(transformation(), mesh_of(where), AXIS)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = jax.block_until_ready(update(g, state, params))
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
    for name, shape in SHAPES.items():
        w, x, residual = loco([g[name] for g in grads], start[name])
        np.testing.assert_allclose(params[name], w, rtol=1e-4, atol=1e-5)
        behind = np.asarray(state.rule.behind[name]).reshape(-1)[: math.prod(shape)]
        np.testing.assert_allclose(params[name] + behind.reshape(shape), x, rtol=1e-4, atol=1e-5)
        kept = state.rule.gradients.residual[name]
        np.testing.assert_allclose(kept, residual, rtol=1e-3, atol=2e-5)


def iterates(tx: optax.GradientTransformation, n: int) -> list[np.ndarray]:
    tx = ef.simulate(tx, n, AXIS)
    rng, params = np.random.default_rng(1), jnp.ones(16)
    state, seen, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(4):
        g = rng.standard_normal((n, 16)).astype(np.float32)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params))
    return seen


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_path_of_the_weights_is_ef21_p(workers: int) -> None:
    """SDP4Bit's: if the gradients are exact and blocks end where shards do."""
    bits = ef.block_quantize(4, block=4)
    sharded = ef.sharded_optimizer(optax.adam(0.1), ef.identity(), bits, axis_name=AXIS)
    dense = ef.compressed_mean(ef.identity(), axis_name=AXIS)
    whole = optax.chain(dense, optax.adam(0.1), ef.ef21_p(bits))
    for one, other in zip(iterates(sharded, workers), iterates(whole, workers), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_the_optimizer_sees_the_exact_weights() -> None:
    """Decay by a half of x, not of w: x halves, and w follows by one entry of each shard."""
    decay = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(0.5))
    tx = ef.sharded_optimizer(decay, ef.identity(), ef.top_k(k=1), axis_name=AXIS)
    tx, x = ef.simulate(tx, 2, AXIS), np.array([4.0, 2.0, 8.0, 1.0])
    params = jnp.array(x, jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jnp.zeros((2, 4)), state, params)
        params, x = params + updates, x / 2
        assert (params + state.behind.reshape(-1)).tolist() == x.tolist()
    assert params.tolist() != x.tolist()


def test_bfloat16_parameters_lose_nothing() -> None:
    """Steps of 2^-10 from 1 are too small for bfloat16; the exact weights take all of them."""
    tx = ef.sharded_optimizer(optax.sgd(2.0**-10), ef.identity(), axis_name=AXIS)
    tx = ef.simulate(tx, 2, AXIS)
    params = jnp.ones(3, jnp.bfloat16)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 9):
        updates, state = update(jnp.full((2, 3), -1, jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
        exact = params.astype(jnp.float32) + state.behind.reshape(-1)[:3]
        assert exact.tolist() == [1 + t * 2.0**-10] * 3
    assert params.dtype == jnp.bfloat16 and params.tolist() == [1.0078125] * 3


@pytest.mark.parametrize(("n", "m"), [(2, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_another_number_of_workers_has_the_same_weights(n: int, m: int) -> None:
    tx = ef.sharded_optimizer(optax.adam(0.1), ef.top_k(k=1), ef.top_k(k=1), axis_name=AXIS)
    old, new = ef.simulate(tx, n, AXIS), ef.simulate(tx, m, AXIS)
    params = jnp.arange(7.0)
    g = np.random.default_rng(0).standard_normal((n, 7)).astype(np.float32)
    _, before = jax.jit(old.update)(g, old.init(params), params)
    after = ef.parallel.change_workers(before, new.init(params))
    one = lambda x: x.reshape(-1)[:7].tolist()  # noqa: E731
    assert one(after.behind) == one(before.behind) and any(one(after.behind))
    assert one(after.inner[0].mu) == one(before.inner[0].mu)


########################################################################################
# On devices
########################################################################################

WORKERS, WIDE = 8, {"up": (32, 64), "down": (64, 30)}
FOUR, EIGHT = ef.block_quantize(4, block=128), ef.block_quantize(8, block=128)


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["up"]) @ params["down"] - batch["y"]) ** 2)


@functools.cache
def trained(kind: str):
    """A jitted step with explicit shardings of everything: losses, state and the program."""
    mesh = mesh_of(kind, WORKERS)
    tx = ef.recipes.loco(optax.adam(1e-2), weights=FOUR, axis_name=AXIS)
    tx = ef.data_parallel(tx, mesh, AXIS)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    params = {name: jax.device_put(0.2 * draw(*s), everywhere) for name, s in WIDE.items()}
    batch = jax.device_put({"x": draw(32, 32), "y": draw(32, 30)}, rows)
    value_and_grad = ef.worker_value_and_grad(loss, mesh, AXIS)

    def step(params, state, batch):
        losses, grads = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses

    state = tx.init(params)
    of_state = jax.tree.map(lambda spec: NamedSharding(mesh, spec), tx.state_specs(params))
    shardings = (everywhere, of_state, rows)
    compiled = (
        jax.jit(step, in_shardings=shardings, out_shardings=shardings, donate_argnums=(0, 1))
        .lower(params, state, batch)
        .compile()
    )
    curve = []
    for _ in range(12):
        params, state, losses = jax.block_until_ready(compiled(params, state, batch))
        curve.append(np.mean(losses))
    return curve, params, state, compiled


@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_nothing_dense_travels(kind: str) -> None:
    """An all-to-all of packed rows, an all-gather of packed differences, and one flag."""
    curve, _, _, compiled = trained(kind)
    assert curve[-1] < 0.8 * curve[0]
    report = ef.wire_report(compiled)
    shards = [-(-math.prod(shape) // WORKERS) for shape in WIDE.values()]
    row = math.ceil(sum(FOUR.bits((size,)) for size in shards) / 32)
    (scatter,), (gather,) = report.of("all_to_all").collectives, report.of("gather").collectives
    assert scatter.message_bytes == 4 * WORKERS * row
    assert gather.message_bytes == 4 * (HEADER_WORDS + row)
    rest = [c for c in report.collectives if c not in (scatter, gather)]
    assert [(c.kind, c.message_bytes) for c in rest] == [("reduce", 4)]


def test_memory_of_a_device() -> None:
    """The weights whole; of e a byte a value and a scale a block; an n-th of 12 bytes a value."""
    _, params, state, compiled = trained("auto")
    values = sum(math.prod(shape) for shape in WIDE.values())
    shards = sum(-(-math.prod(shape) // WORKERS) for shape in WIDE.values())
    device = jax.devices()[0]

    def held(tree) -> int:
        pieces = [p for x in jax.tree.leaves(tree) for p in x.addressable_shards]
        return sum(p.data.nbytes for p in pieces if p.device == device)

    assert held(params) == 4 * values
    message = sum(4 * math.ceil(EIGHT.bits(shape) / 32) for shape in WIDE.values())
    stored = held(state.rule.gradients.residual)
    assert 0 <= stored - message <= 8 * len(WIDE)  # what encoding lost, counted; whole words
    assert held((state.rule.behind, state.rule.inner[0].mu, state.rule.inner[0].nu)) == 12 * shards
    batch = 4 * 32 // WORKERS * (32 + 30)
    taken = compiled.memory_analysis().argument_size_in_bytes - batch
    assert 0 <= taken - 4 * values - stored - 12 * shards < 64  # counters and flags


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ef.sharded_optimizer(3, FOUR), TypeError, "inner=3 is not an Optax trans"),
        (
            lambda: ef.sharded_optimizer(optax.sgd(1), ef.power_sgd(1)),
            TypeError,
            "gradients,.*Power",
        ),
        (
            lambda: ef.sharded_optimizer(optax.sgd(1), FOUR, ef.global_top_k(0.1)),
            TypeError,
            "weights,.*GlobalTopK",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_split_parameters_are_refused() -> None:
    tx = ef.simulate(
        ef.sharded_optimizer(optax.sgd(1.0), FOUR, axis_name=AXIS),
        2,
        AXIS,
        param_specs={"w": P("model")},
        model_axes={"model": 2},
    )
    with pytest.raises(ValueError, match=r"sharded_optimizer: params\['w'\] is split over model"):
        tx.init({"w": jnp.zeros(4)})
