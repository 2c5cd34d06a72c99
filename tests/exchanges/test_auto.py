"""The transport of each leaf: the cheapest by bytes that are counted here by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef_optax as ef
from ef_optax._exchange.rounds import HEADER_WORDS
from ef_optax.measure import planner
from tests.programs import exchange_of

auto = ef.exchanges.auto
SIGN = ef.scaled_sign()


def choices(compressor: ef.Compressor, params, workers: int):
    return ef.exchanges.choices(compressor, params, workers).leaves


def sign_bytes(d: int, n: int) -> dict[str, float]:
    """Of a leaf of d values that travels as signs with a scale, sent and received by a device."""
    chunk = -(-d // n)
    return {
        "gather": 2 * (n - 1) * (d + 32) / 8,
        "reduce": 4 * (n - 1) / n * 4 * d,
        "two_shot": 2 * (n - 1) / n * n * (chunk + 32) / 8 + 2 * (n - 1) * (chunk + 32) / 8,
    }


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 64])
def test_the_cheapest_is_chosen(workers: int) -> None:
    """With fewer rounds unless another one saves a twentieth."""
    for d in (1, 40, 1000, 65536):
        (chosen,) = choices(auto(SIGN), jnp.zeros(d), workers)
        expected = sign_bytes(d, workers)
        assert chosen.link_bytes.keys() == expected.keys()
        for name, count in expected.items():
            assert count <= chosen.link_bytes[name] < count + 1
        least = min(expected.values())
        if chosen.transport == "two_shot":
            assert expected["two_shot"] == least < min(expected["gather"], expected["reduce"])
        else:
            assert expected[chosen.transport] <= 1.05 * least
        assert f"{chosen.link_bytes[chosen.transport]:,} bytes" in chosen.reason


def transports(compressor: ef.Compressor, workers: int, size: int = 65536) -> list[str]:
    return [row.transport for row in choices(compressor, jnp.zeros(size), workers)]


def test_by_codec_workers_latency_and_choice() -> None:
    assert transports(auto(ef.identity()), 8) == ["reduce"]
    assert transports(auto(SIGN), 2) == ["gather"] and transports(auto(SIGN), 64) == ["two_shot"]
    assert transports(auto(ef.top_k(k=8)), 64) == ["leader"]
    sparse = auto(ef.top_k(0.5), among=("gather", "reduce"))
    assert transports(sparse, 2) == ["gather"] and transports(sparse, 8) == ["reduce"]
    # A second round saves 85,960 bytes of eight workers' signs; if it costs more, it is not taken.
    assert transports(auto(SIGN, round_bytes=60_000), 8) == ["two_shot"]
    assert transports(auto(SIGN, round_bytes=90_000), 8) == ["gather"]
    mine = ef.per_leaf(lambda path, leaf: ef.exchanges.leader(ef.top_k(k=1)))
    (row,) = choices(mine, jnp.zeros(8), 4)
    assert (row.transport, row.reason) == (
        "given",
        "the compressor of this leaf is TopK by Leader",
    )


def test_it_exchanges_as_what_it_chose() -> None:
    """Leaves of three sizes travel in three ways, with the same numbers as if told to."""
    n, sizes = 8, {"large": (64, 16), "middle": (30,), "small": (2,)}
    top = ef.top_k(0.1)
    mixed = lambda path, like: auto(SIGN if path != "middle" else top)  # noqa: E731
    params = {name: jnp.zeros(shape) for name, shape in sizes.items()}
    rows = choices(ef.per_leaf(mixed), params, n)
    assert [row.transport for row in rows] == ["two_shot", "leader", "reduce"]
    told = {
        "large": ef.exchanges.two_shot(SIGN),
        "middle": ef.exchanges.leader(top),
        "small": ef.exchanges.reduce(SIGN),
    }
    rng = np.random.default_rng(0)
    grads = {k: rng.standard_normal((3, n, *s)).astype(np.float32) for k, s in sizes.items()}

    def run(compressor, grads):
        rule = ef.error_feedback(compressor, axis_name="w")

        def one(own):
            def step(state, g):
                updates, state = rule.update(g, state)
                return state, updates

            return jax.lax.scan(step, rule.init(jax.tree.map(lambda g: g[0], own)), own)[1]

        return jax.vmap(one, in_axes=1, out_axes=None, axis_name="w")(grads)

    both = jax.jit(
        lambda g: (run(ef.per_leaf(mixed), g), run(ef.per_leaf(lambda p, _: told[p]), g))
    )
    jax.tree.map(np.testing.assert_array_equal, *both(grads))


@pytest.mark.slow
def test_the_compiled_program_moves_what_is_listed(mesh8) -> None:
    shapes = {"kernel": (64, 32), "bias": (4,)}
    compressor = auto(ef.block_top_k(0.1, block=64), among=("gather", "two_shot"))
    rows = choices(compressor, {k: jnp.zeros(s) for k, s in shapes.items()}, 8)
    assert [(row.path, row.transport) for row in rows] == [
        ("bias", "gather"),
        ("kernel", "two_shot"),
    ]
    moved = ef.wire_report(exchange_of(compressor.codec, shapes, mesh8)).link_bytes
    listed = sum(row.link_bytes[row.transport] for row in rows)
    header = 2 * 7 * 4 * HEADER_WORDS
    assert 0 <= moved - listed - header < 3 * 2 * 7 * 4  # whole words
    method = planner.Method("auto", compressor)
    leaves = tuple(planner.Leaf(path, shape) for path, shape in shapes.items())
    planned = planner.rounds_of(method, leaves, 8)
    assert sum(2 * one.received_bytes(8) for one in planned) == pytest.approx(moved, abs=8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: auto(SIGN, among=("leader",)), ValueError, "ScaledSign does not send plain val"),
        (lambda: auto(SIGN, among=("ring",)), ValueError, "among=.'ring',. must be some of"),
        (lambda: auto(SIGN, among="gather"), ValueError, "among='gather' must be some of"),
        (lambda: auto(ef.power_sgd(1)), TypeError, "auto: compressor Power.* is not a stateless"),
        (lambda: ef.ef21(auto(SIGN)), ValueError, "by gather or reduce or two_shot does not give"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_rules_that_need_the_mean_take_the_transports_that_average() -> None:
    averaging = auto(SIGN, among=("gather", "reduce"))
    assert averaging.codec.additive and not averaging.codec.stateful
    assert ef.ef21(averaging).init(jnp.zeros(3)).exchange.codec == ()
