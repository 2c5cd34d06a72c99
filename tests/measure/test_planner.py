"""The planner: exact bytes, times by hand, costs that are measured once, and one clear error."""

from __future__ import annotations

import json
import math
from collections import Counter

import jax
import numpy as np
import pytest

import ef_optax as ef
from docs import scaling
from ef_optax import planner as shell
from ef_optax.measure import planner
from ef_optax.measure.planner import Link, Method, timing
from tests.programs import exchange_of

METHODS = {method.name: method for method in planner.methods()}
DENSE, NARROW = planner.methods()[:2]
SHAPES = {"kernel": (64, 96), "bias": (7,)}
KINDS = ("gather", "reduce", "all_to_all", "permute")
LEAVES = planner.leaves_of({name: np.zeros(shape) for name, shape in SHAPES.items()})


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "name", ["dense float32", "scaled_sign, two_shot", "arc_top_k 1%", "SparseLoCo, H = 30"]
)
def test_rounds_are_those_of_the_compiled_program(name: str, mesh4) -> None:
    """The same kinds with the same bytes, contributed and on the link."""
    rounds = planner.rounds_of(METHODS[name], LEAVES, 4)
    wire = ef.wire_report(exchange_of(METHODS[name].compressor.codec, SHAPES, mesh4))
    sent: Counter[str] = Counter()
    received = dict.fromkeys(KINDS, 0.0)
    for one in rounds:
        sent[one.kind] += one.message_bytes
        received[one.kind] += 2 * one.received_bytes(4)
    for kind in KINDS:
        assert sent[kind] == wire.of(kind).message_bytes
        assert received[kind] == pytest.approx(wire.of(kind).link_bytes, abs=1)


def test_a_number_of_parameters_stands_for_a_transformer_of_that_size() -> None:
    for count in (1, 1000, 123_456_789, 70 * 10**9):
        assert sum(leaf.size for leaf in planner.leaves_of(count)) == count
    layers = planner.leaves_of(1e9)
    assert {leaf.path for leaf in layers} == {"attention", "up", "down", "embedding", "bias"}
    tree = {"a": np.zeros((2, 3)), "b": [np.zeros((2, 3)), np.zeros(4)]}
    assert [(leaf.shape, leaf.times) for leaf in planner.leaves_of(tree)] == [
        ((2, 3), 2),
        ((4,), 1),
    ]


def test_state_is_what_a_worker_holds() -> None:
    """In units of the parameters: a residual; with a served shard; drift, momentum and residual."""
    leaves = planner.leaves_of({"w": np.zeros((64, 64))})
    held = {
        name: planner.state_bytes(method, leaves, 4) / 2**14 for name, method in METHODS.items()
    }
    assert held["dense float32"] == held["dense bfloat16"] == 0
    assert held["scaled_sign"] == held["arc_top_k 1%"] == 1
    assert held["scaled_sign, two_shot"] == 1.25
    assert held["power_sgd(4)"] == 1 + 4 / 64  # and the factor that is kept
    assert held["DiLoCo, H = 30"] == held["SparseLoCo, H = 30"] == 2
    assert held["DiLoCo, H = 30, 4 bits"] == 3.25


def test_policies_by_leaf_and_by_step_are_resolved() -> None:
    by_leaf = ef.per_leaf(lambda path, x: ef.identity() if x.ndim < 2 else ef.scaled_sign())
    method = Method("mixed", ef.scheduled([5], [ef.identity(), ef.scaled_sign()]))
    assert planner.rounds_of(method, LEAVES, 4) == planner.rounds_of(
        METHODS["scaled_sign"], LEAVES, 4
    )
    kinds = {r.kind: r.message_bytes for r in planner.rounds_of(Method("m", by_leaf), LEAVES, 4)}
    assert kinds == {"gather": 4 * (64 * 96 // 32 + 1 + 2), "reduce": 4 * 7}


# ---------------------------------------------------------------------------- times


def a_plan(rate: str = "1gbit", **options) -> planner.Plan:
    options = {"codec": "free", "methods": [DENSE, NARROW, METHODS["DiLoCo, H = 30"]], **options}
    link = Link(rate, "10ms", efficiency=1.0, sharing=options.pop("sharing", 1))
    return planner.plan(1e8, 4, link, options.pop("step_time", "0.5s"), **options)


def test_times_by_hand() -> None:
    """400 MB by an all-reduce of 4 workers: 2 x 3/4 x 400 MB at 125 MB/s, and 2 x 2 x 10 ms."""
    row = a_plan().row("dense float32")
    assert row.transfer == pytest.approx(4.8 + 0.04, rel=1e-6)
    assert row.seconds == pytest.approx(0.5 + 4.84, rel=1e-6)
    assert a_plan(ring=True).rows[0].transfer == pytest.approx(4.8 + 0.06, rel=1e-6)
    assert a_plan(sharing=8).rows[0].transfer == pytest.approx(8 * 4.8 + 0.04, rel=1e-6)
    assert a_plan(overlap=0.5).rows[0].seconds == pytest.approx(0.5 + 4.84 - 0.25, rel=1e-6)
    assert a_plan().row("DiLoCo, H = 30").seconds == pytest.approx(0.5 + 4.84 / 30, rel=1e-6)
    costs = {m.name: planner.CodecSeconds(2e-9, 1e-9) for m in METHODS.values()}
    assert a_plan(codec=costs).rows[0].codec == pytest.approx(1e8 * (2e-9 + 3e-9))


def test_devices_of_a_worker_exchange_their_own_part() -> None:
    """HSDP: a fourth of the bytes and of the state, and a dense all-reduce on the fast link."""
    inside = Link("400gbit", "0ms", efficiency=1.0)
    row = a_plan(devices=4, inside=inside).row("dense float32")
    assert row.transfer == pytest.approx(4.8 / 4 + 0.04, rel=1e-4)
    assert row.inside == pytest.approx(2 * 3 / 4 * 4e8 / 50e9, rel=1e-6)


def test_tiers_inside_of_a_worker_by_hand() -> None:
    """Each tier reduces what the faster ones have left of it; the slow link moves the last part."""
    link = lambda rate, latency: Link(rate, latency, efficiency=1.0)  # noqa: E731
    tiers = [
        planner.Tier(4, link("400gbit", "1us")),
        planner.Tier(2, link("80gbit", "1ms")),
        planner.Tier(4, link("8gbit", "2ms")),
    ]
    row = a_plan(inside=tiers).row("dense float32")
    want = 2 * 3 / 4 * 4e8 / 50e9 + 2 * 2 * 1e-6
    want += 2 * 1 / 2 * 1e8 / 10e9 + 2 * 1e-3
    want += 2 * 3 / 4 * 5e7 / 1e9 + 2 * 2 * 2e-3
    assert row.inside == pytest.approx(want, rel=1e-6)
    assert row.transfer == pytest.approx(4.8 / 32 + 0.04, rel=1e-3)
    one, two = a_plan(inside=tiers[:1]), a_plan(inside=tiers[0].link, devices=4)
    assert one.row("dense float32") == two.row("dense float32")


def test_no_message_is_faster_than_the_software() -> None:
    fast = planner.plan(1e8, 4, Link("400gbit", software="1gbit"), 0.5, codec="free")
    assert fast.row("dense float32").transfer == pytest.approx(4.8, rel=1e-6)
    slow = Link("100mbit", software="1gbit")
    assert slow.bytes_per_second == Link("100mbit").bytes_per_second


def test_break_even_is_where_the_order_changes() -> None:
    method = METHODS["power_sgd(4)"]
    costs = {name: planner.CodecSeconds(1e-9 if name == method.name else 0) for name in METHODS}
    options = {"methods": [DENSE, NARROW, method], "codec": costs}
    plan = a_plan(**options)
    row, dense = plan.row(method.name), plan.row("dense bfloat16")
    rate = row.break_even
    # It saves bytes, and costs 0.1 s of computation and one all-reduce more: 4 x 10 ms.
    saved = 8 * (dense.received_bytes - row.received_bytes)
    assert rate == pytest.approx(saved / (0.1 + 0.04), rel=0.01)
    for factor, wins in ((0.99, True), (1.01, False)):
        plan = a_plan(f"{rate * factor}bit", **options)
        assert (plan.row(method.name).seconds < plan.dense.seconds) is wins


def test_the_advice_is_honest() -> None:
    """Not to compress where nothing is gained, and local steps only with a word about the loss."""
    assert a_plan("400gbit", step_time=5).recommendation.startswith("Do not compress here: ")
    slow = planner.plan(1e8, 8, Link("100mbit", "5ms"), 0.5, codec="free")
    assert f"fastest step is that of {slow.best_every_step.method.name}:" in slow.recommendation
    assert "compare the loss" in a_plan("100mbit").recommendation
    assert "does not pay here" in a_plan("100mbit").recommendation  # only dense ones every step


# ---------------------------------------------------------------------------- the codec's time


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ef_optax" / "codec_seconds.json"


def test_costs_are_measured_once(cache, monkeypatch) -> None:
    calls = []
    answer = planner.CodecSeconds(3e-9, 1e-9)
    monkeypatch.setattr(timing, "measure", lambda method: calls.append(method.name) or answer)
    sign = METHODS["scaled_sign"]
    assert planner.codec_seconds(sign) == planner.codec_seconds(sign) == answer
    assert planner.codec_seconds(DENSE) == planner.CodecSeconds(0.0)
    assert calls == ["scaled_sign"]
    (key,) = json.loads(cache.read_text())
    assert jax.__version__ in key and jax.devices()[0].device_kind in key
    planner.codec_seconds(sign, fresh=True)
    cache.write_text("{ half a file")
    planner.codec_seconds(sign)
    assert calls == ["scaled_sign"] * 3 and len(json.loads(cache.read_text())) == 1


@pytest.mark.slow
def test_a_measurement_takes_longer_for_more_messages(cache, monkeypatch) -> None:
    monkeypatch.setattr(timing, "SIDE", 256)
    found = planner.codec_seconds(METHODS["scaled_sign"])
    assert 0 < found.own < 1e-5 and 0 <= found.other < 1e-5
    assert planner.codec_seconds(METHODS["scaled_sign"]) == found


# ---------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "value"),
    [("50mbit", 5e7), ("400Gbit/s", 4e11), ("12GB/s", 9.6e10), ("1.5e3kbps", 1.5e6), (7, 7.0)],
)
def test_bandwidths(text, value: float) -> None:
    assert planner.bandwidth(text) == value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: planner.bandwidth("fast"), "bandwidth='fast' is not a bandwidth"),
        (lambda: planner.bandwidth(-1), "bandwidth=-1 is not"),
        (lambda: planner.bandwidth("1.2.3gbit"), "is not a bandwidth"),
        (lambda: planner.seconds("3 parsecs"), "is not a time"),
        (lambda: Link("1gbit", latency=-1), "latency=-1 is not a time"),
        (lambda: Link("1gbit", sharing=0), "sharing=0"),
        (lambda: Link("1gbit", efficiency=2), "efficiency=2"),
        (lambda: planner.leaves_of(0.5), "params=0.5"),
        (lambda: planner.leaves_of({}), "params has no parameters"),
        (lambda: a_plan(overlap=2), "overlap=2"),
        (lambda: a_plan(devices=2), "give inside"),
        (lambda: a_plan(devices=2, inside=[]), "devices=2 with several tiers"),
        (lambda: planner.Tier(0, Link("1gbit")), "devices=0 must be"),
        (lambda: Link("1gbit", software="slow"), "software='slow' is not a bandwidth"),
        (lambda: a_plan(codec="quick"), "codec='quick'"),
        (lambda: a_plan(codec={}), "codec has no entry"),
        (lambda: a_plan(methods=[METHODS["scaled_sign"]]), "no dense method"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


ASKED = ["--params=1e8", "--workers=4", "--bandwidth=1gbit", "--step_time=0.5s", "--codec=free"]


def test_the_shell_prints_the_plan(capsys) -> None:
    assert shell.main([*ASKED, "--latency=10ms", "--efficiency=1", "--steps=1000"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("100,000,000 parameters, 4 workers, 1 Gbit/s, latency 10 ms, 500 ms")
    (line,) = (line for line in out.splitlines() if line.startswith("dense float32"))
    cells = line.split()
    assert cells[2:4] == ["400", "MB"] and ["5.34", "s"] == cells[10:12]
    assert all(name in out for name in METHODS) and "The fastest step is" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=4.5", "error: workers='4.5' is not a whole number, such as 64."),
        ("--workers=0", "error: workers=0 must be an integer of at least 1."),
        ("--params=many", "error: params='many' is not a number, such as 0.5."),
        ("--bandwidth=wide", "error: bandwidth='wide' is not a bandwidth; "),
        ("--tiers=many@1gbit", "error: tiers='many' is not a whole number"),
        ("--codec=slow", "error: codec='slow' is not a number"),
    ],
)
def test_the_shell_says_in_one_line_what_is_wrong(option: str, message: str, capsys) -> None:
    assert shell.main([*ASKED, option]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out


def test_the_page_is_fresh() -> None:
    """Its first table and the comparison with measured numbers; all of it in the slow run."""
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.beside_measured() in page
    assert scaling.choice(scaling.plan_of("1B", 8, "1 Gbit/s, 20 ms")) in page


@pytest.mark.slow
def test_the_whole_page_is_fresh() -> None:
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page()


def test_infinite_and_no_break_even() -> None:
    plan = a_plan(codec="free", methods=[DENSE, METHODS["DiLoCo, H = 30"], METHODS["scaled_sign"]])
    assert math.isinf(plan.row("DiLoCo, H = 30").break_even)
    wide = planner.plan(
        1e8, 128, Link("1gbit"), 0.5, methods=[DENSE, METHODS["scaled_sign"]], codec=0
    )
    assert wide.row("scaled_sign").break_even == 0  # signs that are gathered from 128 workers
    assert wide.best.method is DENSE


# ------------------------------------------------------------------------ methods by name


def test_named_methods_send_what_the_listed_ones_send(capsys: pytest.CaptureFixture[str]) -> None:
    """The same rounds and the same state as the methods that are written out."""
    text = (
        "error_feedback(block_top_k(0.01)) | adamw(3e-4), local.diloco(sgd(1.0), 30), adamw(1e-3)"
    )
    top_k, diloco, dense = planner.named(text)
    leaves = planner.leaves_of({"w": np.zeros((64, 64)), "b": np.zeros(64)})
    rule = planner.Method("by hand", ef.block_top_k(0.01))
    assert planner.rounds_of(top_k, leaves, 4) == planner.rounds_of(rule, leaves, 4)
    # The residual alone: the moments after the bar are the optimizer's.
    assert planner.state_bytes(top_k, leaves, 4) == 4 * (64 * 64 + 64)
    assert (diloco.period, dense.period, dense.dense) == (30, 1, True)
    (reduce,) = planner.rounds_of(dense, leaves, 4)
    assert (reduce.kind, reduce.message_bytes) == ("reduce", 4 * (64 * 64 + 64) + 4)
    assert shell.main([*ASKED, f"--methods={text}"]) == 0
    shown = capsys.readouterr().out
    assert "error_feedback(block_top_k(0.01)) | adamw(0.0003)" in shown and "dense" in shown
    for wrong, words in (("top_k(0.1)", "is a compressor"), ("adamv(1)", "adamw")):
        assert shell.main([*ASKED, f"--methods={wrong}"]) == 2
        assert words in capsys.readouterr().err
