"""Compressors whose message depends on the other workers or on the other leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._core.messageless import MessagelessCodec
from ef_optax._exchange.exchange import Exchange
from ef_optax._exchange.joined import Joined
from ef_optax.compressors.combine.induced import induced
from ef_optax.compressors.combine.probabilistic_mix import probabilistic_mix
from ef_optax.compressors.combine.scale_to_contractive import scale_to_contractive
from ef_optax.compressors.low_rank.power_sgd import power_sgd
from ef_optax.compressors.quantize.cast import cast
from ef_optax.compressors.quantize.qsgd import qsgd
from ef_optax.compressors.quantize.ternary import ternary
from ef_optax.compressors.sparse.count_sketch import count_sketch, sketch, sketch_estimates
from ef_optax.compressors.sparse.global_top_k import global_top_k
from ef_optax.compressors.sparse.random_k import random_k
from ef_optax.compressors.sparse.top_k import top_k
from ef_optax.exchanges.global_top_k_of_sum import global_top_k_of_sum
from ef_optax.exchanges.majority import majority_vote
from ef_optax.exchanges.perm import perm_k
from ef_optax.feedback.compressed_mean import compressed_mean
from ef_optax.feedback.ef14 import error_feedback
from ef_optax.parallel.simulation import simulate
from tests.compressors.coding import Keyed


def feedback(compressor, gradients):
    """One step of error feedback between simulated workers: aggregate, memories."""
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients)
    n = len(jax.tree.leaves(gradients)[0])
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), gradients)
    tx = simulate(error_feedback(compressor, axis_name="data"), n, "data")
    out, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    return jax.tree.map(np.asarray, (out, state.residual))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_global_top_k_against_numpy() -> None:
    """One budget over three leaves; ties go to the earlier leaf."""
    g = {"a": normal(2, 7), "b": normal(2, 3, 4, seed=1), "c": np.full((2, 2), 0.01)}
    out, memory = feedback(global_top_k(0.2), g)
    flat = np.concatenate([g[k].reshape(2, -1) for k in "abc"], axis=1)
    sent = np.zeros_like(flat)
    for i in range(2):
        kept = np.argsort(-np.abs(flat[i]), kind="stable")[:5]  # ceil(0.2 * 21)
        sent[i, kept] = flat[i, kept]
    got = np.concatenate([np.reshape(out[k], -1) for k in "abc"])
    np.testing.assert_allclose(got, sent.mean(0), atol=1e-6)
    owed = np.concatenate([np.reshape(memory[k], (2, -1)) for k in "abc"], axis=1)
    np.testing.assert_allclose(owed, flat - sent, atol=1e-6)


def test_global_top_k_keeps_dtypes() -> None:
    tree = {"a": jnp.asarray([1.0, -4.0], "bfloat16"), "b": jnp.asarray([3.0, 0.5])}
    out, _ = jax.jit(global_top_k(k=2).update)(tree, global_top_k(k=2).init(tree))
    assert out["a"].dtype == jnp.bfloat16 and out["a"].tolist() == [0, -4]
    assert out["b"].tolist() == [3, 0]


def test_global_top_k_of_sum_gives_back_what_was_not_applied() -> None:
    """Aggregate = mean of what was sent; sent + memory = input, worker by worker."""
    g = normal(4, 30)
    out, memory = feedback(global_top_k_of_sum(k=5), g)
    local = np.zeros_like(g)
    for i in range(4):
        kept = np.argsort(-np.abs(g[i]), kind="stable")[:5]
        local[i, kept] = g[i, kept]
    total = local.sum(0)
    chosen = np.argsort(-np.abs(total), kind="stable")[:5]
    expected = np.zeros(30)
    expected[chosen] = total[chosen] / 4
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(np.mean(g - memory, axis=0), out, atol=1e-6)


def merged(a: dict, b: dict, k: int) -> dict:
    """The k largest magnitudes of the sum of two sparse vectors."""
    total = {i: a.get(i, 0.0) + b.get(i, 0.0) for i in {*a, *b}}
    return dict(sorted(total.items(), key=lambda item: (-abs(item[1]), item[0]))[:k])


def tree_oracle(g: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Aggregate and memories of gTop-k: pairwise merges into worker 0, whose result all apply."""
    n, d = g.shape
    own = [np.argsort(-np.abs(row), kind="stable")[:k] for row in g.astype(np.float64)]
    held = [{int(c): float(g[i, c]) for c in own[i]} for i in range(n)]
    step = 1
    while step < n:
        for i in range(0, n, 2 * step):
            held[i] = merged(held[i], held[i + step], k)
        step *= 2
    out, memory = np.zeros(d), g.astype(np.float64).copy()
    for c, value in held[0].items():
        out[c] = value / n
    for i in range(n):
        memory[i, [c for c in own[i] if c in held[0]]] = 0
    return out, memory


def tree_inputs(n: int) -> np.ndarray:
    """A coordinate that one branch drops and another sends; ties; overlaps."""
    g = np.round(4 * normal(n, 24, seed=3)) / 4
    g[0, 5], g[n - 1, 5] = 1.0, 9.0
    return g.astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_global_top_k_tree_against_numpy(n: int) -> None:
    g = tree_inputs(n)
    out, memory = feedback(global_top_k_of_sum(k=4, tree=True), g)
    expected, owed = tree_oracle(g, 4)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(memory, owed)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_global_top_k_tree_on_devices(how: str, mesh4) -> None:
    """Equal on all workers, and equal to the oracle."""
    g = jnp.asarray(tree_inputs(4))
    rule = error_feedback(global_top_k_of_sum(k=4, tree=True), axis_name="data")

    def one(row):
        out, state = rule.update(row, rule.init(row))
        return out, state.residual

    if how == "pmap":
        out, memory = jax.pmap(one, axis_name="data", devices=jax.devices()[:4])(g)
    else:
        local = lambda x: jax.tree.map(lambda a: a[None], one(x[0]))  # noqa: E731
        spec = jax.sharding.PartitionSpec("data")
        out, memory = jax.jit(jax.shard_map(local, mesh=mesh4, in_specs=spec, out_specs=spec))(g)
    expected, owed = tree_oracle(np.asarray(g), 4)
    np.testing.assert_array_equal(out, np.stack([out[0]] * 4))
    np.testing.assert_allclose(out[0], expected, atol=1e-6)
    np.testing.assert_array_equal(memory, owed)


def test_a_tree_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="3 workers.*tree=False"):
        feedback(global_top_k_of_sum(k=1, tree=True), normal(3, 4))


def test_the_rows_of_two_shot_draw_apart() -> None:
    """Each worker's row for each other worker is compressed with a key of its own."""
    shot = ef.exchanges.two_shot(ef.Compressor(Keyed(jax.random.key(0))))
    exchange = Exchange(shot.codec, "w")

    def one(x):
        return exchange(x, exchange.init(x), want=("sent",)).sent

    sent = jax.jit(jax.vmap(one, axis_name="w"))(jnp.ones((3, 6)))
    assert len(np.unique(sent)) == 9


def test_ternary_with_a_shared_scale() -> None:
    """All send multiples of the largest magnitude of all workers; the mean is unbiased."""
    g = np.float32([[1.0, -2.0, 0.5, 0.0], [0.25, 8.0, -4.0, 0.0]])
    codec = ternary(0, shared_scale=True).codec
    assert codec.traffic((4,), "float32", 2) == (32, 8) and codec.omega((4,), 2) is None
    rule = compressed_mean(ternary(0, shared_scale=True), axis_name="data")
    tx = simulate(rule, 2, "data")

    def step(state, _):
        out, state = tx.update(jnp.asarray(g), state, jnp.zeros(4))
        return state, out

    _, means = jax.jit(lambda s: jax.lax.scan(step, s, length=4000))(tx.init(jnp.zeros(4)))
    means = np.asarray(means, np.float64)
    assert set(np.unique(means)) <= {-8.0, -4.0, 0.0, 4.0, 8.0}
    error = means.std(0) / np.sqrt(4000)
    assert (np.abs(means.mean(0) - g.mean(0)) <= 5 * error).all() and (means[:, 3] == 0).all()
    _, memory = feedback(ternary(0, shared_scale=True), g)
    sent = g - memory
    assert np.isin(np.abs(sent), [0.0, 8.0]).all() and abs(sent[1, 1]) == 8


def test_sketch_is_linear_and_finds_large_values() -> None:
    """The sum of sketches is the sketch of the sum; alone in their buckets, values are exact."""
    spike = np.zeros(50, np.float32)
    spike[[4, 30]] = 2.0, -7.0

    @jax.jit
    def run(x, y, spike, key):
        both = sketch(x, key, 3, 20) + sketch(y, key, 3, 20)
        found = sketch_estimates(sketch(spike, key, 5, 40), key, 50)
        return both, sketch(x + y, key, 3, 20), found

    both, sum_of_both, found = run(normal(50), normal(50, seed=1), spike, jax.random.key(0))
    np.testing.assert_allclose(both, sum_of_both, atol=1e-5)
    found = np.asarray(found)
    assert found[[4, 30]].tolist() == [2, -7] and np.argmax(np.abs(found)) == 30


def test_sketch_estimates_are_unbiased_in_each_row() -> None:
    """One row: E s(i) T[h(i)] = x_i over the hashes, with variance about ||x||^2/columns."""
    x = jnp.asarray(normal(30))
    keys = jax.random.split(jax.random.key(1), 4000)
    found = jax.jit(jax.vmap(lambda key: sketch_estimates(sketch(x, key, 1, 10), key, 30)))(keys)
    error = np.asarray(found, np.float64) - np.asarray(x)
    assert np.abs(error.mean(0)).max() < 5 * error.std() / np.sqrt(4000)
    assert error.var() == pytest.approx(float(jnp.sum(x**2)) / 10, rel=0.1)


def test_count_sketch_between_workers() -> None:
    """All workers send the same k coordinates, and the mean is large there."""
    g = 0.01 * normal(3, 200)
    g[:, [5, 60, 199]] += np.asarray([[3.0, -2.0, 1.0]])
    out, memory = feedback(count_sketch(5, 100, k=3), g)
    assert np.flatnonzero(out).tolist() == [5, 60, 199]
    np.testing.assert_allclose(out[[5, 60, 199]], g.mean(0)[[5, 60, 199]], rtol=1e-5)
    assert (memory[:, [5, 60, 199]] == 0).all()
    np.testing.assert_allclose(np.delete(memory, [5, 60, 199], 1), np.delete(g, [5, 60, 199], 1))
    assert count_sketch(5, 100, k=3).codec.traffic((200,), "float32", 3) == (16000, 96)


def test_induced_variance_is_that_of_the_rest() -> None:
    """omega (1 - alpha): random-k of what top-k leaves."""
    x = normal(40)
    codec = induced(top_k(0.25), random_k(0.5, 0, scaled=True)).codec
    rest = np.sort(np.abs(x))[:30]
    like, keys = jax.ShapeDtypeStruct((40,), jnp.float32), jax.random.split(jax.random.key(0), 3000)
    y = jax.jit(jax.vmap(lambda k: codec.decode(codec.encode(jnp.asarray(x), k), like)))(keys)
    error = np.sum((np.asarray(y, np.float64) - x) ** 2, axis=1).mean()
    assert error == pytest.approx(np.sum(rest**2), rel=0.05)
    assert codec.omega(40) == 0.75


def test_mixture_uses_its_probabilities() -> None:
    codec = probabilistic_mix([top_k(k=1), cast("bfloat16")], [0.3, 0.7], 0).codec
    x, like = jnp.asarray([1.0, 2.0, -4.0]), jax.ShapeDtypeStruct((3,), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3000)
    y = np.asarray(jax.jit(jax.vmap(lambda k: codec.decode(codec.encode(x, k), like)))(keys))
    sparse = (y == [0, 0, -4]).all(1)
    assert (sparse | (y == [1, 2, -4]).all(1)).all()
    assert sparse.mean() == pytest.approx(0.3, abs=0.03)
    assert codec.bits(3) == 1 + max(32 + 2, 3 * 16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: induced(random_k(0.5, 0, scaled=True), top_k(0.5)), ValueError, "order"),
        (lambda: induced(top_k(0.5), perm_k(0)), TypeError, "one worker"),
        (lambda: induced(majority_vote(), qsgd(1, 0)), TypeError, "one worker"),
        (lambda: scale_to_contractive(top_k(0.5)), ValueError, "not unbiased"),
        (lambda: probabilistic_mix([top_k(0.5)], [1.0], 0), ValueError, "at least two"),
        (lambda: probabilistic_mix([top_k(0.5)] * 2, [0.5, 0.6], 0), ValueError, "add up to 1"),
        (lambda: probabilistic_mix([power_sgd(1)] * 2, [0.5, 0.5], 0), TypeError, "stateless"),
        (lambda: count_sketch(3, 0, k=1), ValueError, "columns=0"),
        (lambda: count_sketch(3, 4, k=1).codec.encode(jnp.ones(3)), TypeError, "no encode"),
        (lambda: global_top_k(), ValueError, "exactly one"),
    ],
)
def test_bad_arguments(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def messageless():
    """One codec of each class without a message of its own; a new class must be listed here."""
    return {
        "AcpSgd": ef.acp_sgd(1),
        "ArcTopK": ef.arc_top_k(k=1),
        "Auto": ef.exchanges.auto(ef.sign()),
        "DionFactors": ef.dion_factors(1),
        "SharedRows": ef.shared_rows(k=1),
        "Carried": ef.exchanges.two_shot(ef.sign()),
        "Controlled": ef.policies.hold_bytes([ef.top_k(k=1), ef.sign()], 99),
        "CountSketch": ef.count_sketch(3, 4, k=1),
        "GradiVeQ": ef.gradiveq(0.5, samples=1, period=2),
        "GreedyLore": ef.greedy_lore(1, period=2),
        "Joined": ef.Compressor(Joined(ef.block_top_k(k=1).codec)),
        "JointSparse": ef.Compressor(ef.top_k(k=1).codec.joint(_like(1 << 20))),
        "PerLeaf": ef.per_leaf(lambda path, like: ef.top_k(k=1)),
        "PowerSgd": ef.power_sgd(1),
        "Scheduled": ef.scheduled([1], [ef.top_k(k=1), ef.sign()]),
        "SignRows": ef.Compressor(ef.scaled_sign().codec.joint(_like(8))),
        "SignWords": ef.Compressor(ef.scaled_sign().codec.joint(_like(64))),
        "SparseRows": ef.Compressor(ef.top_k(k=1).codec.joint(_like(8))),
    }


def _like(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), "float32")


def test_codecs_without_a_message_say_so_and_what_to_do() -> None:
    def final(kind: type) -> set[str]:
        own = [sub for sub in kind.__subclasses__() if sub.__module__.startswith("ef_optax.")]
        below = set().union(*(final(sub) for sub in own))
        return below or {kind.__name__}

    examples = messageless()
    assert final(MessagelessCodec) | {"Scheduled"} == set(examples)  # which Controlled extends
    like = jax.ShapeDtypeStruct((2, 2), "float32")
    for name, compressor in examples.items():
        codec = compressor.codec
        for what, call in (
            ("encode", lambda codec=codec: codec.encode(jnp.ones((2, 2)))),
            ("decode", lambda codec=codec: codec.decode(jnp.ones(2), like)),
        ):
            remedy = r"Use it in error_feedback|Ask codec\."
            with pytest.raises(TypeError, match=rf"^{name} has no {what} of its own: .*({remedy})"):
                call()
