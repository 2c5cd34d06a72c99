"""The bytes are real: the compiled program moves what the codec says, in one transfer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import ef_optax as ef
from ef_optax._core.codec import Codec
from ef_optax._exchange.links import link_amount
from ef_optax._exchange.rounds import HEADER_WORDS
from tests.compressors.pool import CASES
from tests.exchanges.pool import EXCHANGES
from tests.programs import exchange_of

SHAPES = {"kernel": (6, 11), "bias": (7,)}


CARRIED = ("global_top_k_of_sum", "global_top_k_of_sum-tree", "leader", "majority_vote", "reduce")
# The rounds, counted from the last, in which arrays are summed as they are, each in whole words.
SUMMED = {"global_top_k_of_sum-tree": (-1,), "leader": (-1, -2)}
POOL = {name: case.make for name, case in CASES.items()} | {n: EXCHANGES[n] for n in CARRIED}


# How many bits a codec says it sends is held to its message in tests/compressors/test_codecs.py.
QUICK = ("top_k", "scaled_sign")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in POOL]
)
def test_bytes_of_every_codec(name: str, mesh4) -> None:
    """The compiled exchange moves the codec's bits in whole words and the header, no more."""
    codec: Codec = POOL[name]().codec
    report = ef.wire_report(exchange_of(codec, SHAPES, mesh4))
    rounds = len(codec.traffic((6, 11), jnp.float32, 4))
    assert report.rounds == rounds
    traffic = [codec.traffic(s, jnp.float32, 4) for s in SHAPES.values()]
    words = HEADER_WORDS if report.of("gather").rounds else 1  # one number if all is summed
    summed = SUMMED.get(name, ())
    for number, bits in enumerate(zip(*traffic, strict=True), start=-rounds):
        words += (
            sum(math.ceil(b / 32) for b in bits) if number in summed else math.ceil(sum(bits) / 32)
        )
    assert report.message_bytes == 4 * words


def many_leaves():
    tree = {}
    for i in range(8):
        tree[f"layer{i:02}"] = {
            "kernel": jnp.zeros((8 + i % 5, 16)),
            "bias": jnp.zeros((16,)),
        }
    return tree


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda: ef.top_k(0.05), ef.scaled_sign],
    ids=["top_k", "sign"],
)
def test_many_leaves_travel_in_one_gather_of_exactly_their_bits(make, mesh8) -> None:
    compressor, params = make(), many_leaves()
    chain = optax.chain(ef.error_feedback(compressor, axis_name="data"), optax.sgd(0.1))
    tx = ef.data_parallel(chain, mesh8, "data")
    grads = jax.tree.map(lambda p: jnp.ones((8, *p.shape)), params)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    report = ef.wire_report(compiled)
    assert [c.kind for c in report.collectives] == ["gather"]
    assert report.collectives[0].group_size == 8
    bits = ef.message_bits(compressor, params)
    assert report.message_bytes == 4 * (HEADER_WORDS + math.ceil(bits / 32))
    assert report.link_bytes == 2 * 7 * report.message_bytes


LEAF = 1 << 16
NARROW_MEANS = {"means_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        pytest.param(*case, marks=() if name == "quartic" else (pytest.mark.slow,), id=name)
        for name, case in {
            "top-1%": (lambda: ef.block_top_k(0.01), 70),
            "bf16": (lambda: ef.compose(ef.cast("bfloat16"), ef.block_top_k(0.01)), 110),
            "2-bit": (
                lambda: ef.compose(ef.sigma_bins(2, **NARROW_MEANS), ef.block_top_k(0.01)),
                200,
            ),
            "signs": (ef.scaled_sign, 32 * LEAF / (LEAF + 32 + 64)),
            "ternary": (lambda: ef.ternary(0), 32 * LEAF / (2 * LEAF + 32 + 64)),
            "quartic": (lambda: ef.ternary(0, packing="quartic"), 19.9),
        }.items()
    ],
)
def test_compression_factors_of_the_compiled_program(make, factor: float, mesh4) -> None:
    """Dense bytes over the bytes of the message with its header, for a leaf of 65,536 values."""
    codec = make().codec
    report = ef.wire_report(exchange_of(codec, {"w": (LEAF,)}, mesh4))
    assert 4 * LEAF / report.message_bytes >= factor


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (ef.scaled_sign, 1),
        (lambda: ef.ternary(0), 2),
        (lambda: ef.qsgd(3, 0), 3),
        (lambda: ef.qsgd(7, 0), 4),
        (lambda: ef.natural_dithering(20, 0), 6),
        (lambda: ef.uniform(8), 8),
        (lambda: ef.block_top_k(1.0), 32 + 12),
    ],
)
def test_packed_widths(make, width: int) -> None:
    """Values (and 12-bit indices) take exactly their width, not the next byte or word."""
    compressor = make()
    assert compressor.bits((3 * 4096,)) - compressor.bits((4096,)) == 2 * 4096 * width


SPELLINGS = """
HloModule m, num_partitions=8

%cond (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ar = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%branch0 (p: f32[4]) -> f32[4] {
  %ag = u32[2,6]{1,0} all-gather(%x), replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
}

%branch1 (p: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0)
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, TRIPS
  %c = f32[4]{0} conditional(%i, %a, %b), branch_computations={%branch0, %branch1}
  %s = (bf16[3]{0}, bf16[24]{0}) all-gather-start(%y), replica_groups=mesh['data'=8] {'data'}
  %e = bf16[24]{0} all-gather-done(%s)
  %t2 = (u32[1,4]{1,0}, u32[1,4]{1,0}) all-to-all(%u, %v), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %two = (f32[], s32[8]{0}) all-reduce(%k, %l), replica_groups=mesh['data'=4,'model'=2] {'model'}
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_report_reads_every_spelling() -> None:
    report = ef.wire_report(SPELLINGS)
    found = {(c.kind, c.group_size): c for c in report.collectives}
    loop = found["reduce", 4]
    assert (loop.message_bytes, loop.times, loop.conditional) == (16, 5, False)
    branch = found["gather", 2]
    assert (branch.message_bytes, branch.link_bytes, branch.conditional) == (24, 48, True)
    start = found["gather", 8]
    assert (start.message_bytes, start.link_bytes) == (6, 84)
    assert found["all_to_all", 2].message_bytes == 32
    assert found["reduce", 2].message_bytes == 36
    assert report.rounds == 5 and "conditional" in str(report)


EQUAL = """HloModule m, num_partitions=8

ENTRY %main (p0: f32[4]) -> f32[4] {
  %slow = u32[2,3]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %same = u32[2,3]{1,0} all-gather(%x), replica_groups=mesh['dcn'=2,'a'=2,'b'=2] {'dcn'}
  %fast = f32[5]{0} all-reduce(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %both = f32[] all-reduce(%z), replica_groups={}, to_apply=%add
  %next = f32[7]{0} collective-permute(%u), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
}
"""


def test_axes_of_equal_size_are_told_apart() -> None:
    """The slow axis has devices 0 and 4 together, the last one 0 and 1, the middle one 0 and 2."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("dcn", "fsdp", "tensor"))
    report = ef.wire_report(EQUAL)

    def moved(*axes: str) -> list[int]:
        return [c.message_bytes for c in report.along(mesh, axes).collectives]

    assert moved("dcn") == [12, 12]
    assert moved("fsdp") == [28]
    assert moved("tensor") == [20]
    assert moved("tensor", "dcn", "fsdp") == [4, 28]
    assert report.along(mesh, "fsdp") == report.along(mesh, ["fsdp"])
    assert len(report.over(2).collectives) == 3
    with pytest.raises(ValueError, match="axis_name='data' is no axis of the mesh"):
        report.along(mesh, "data")


def test_report_refuses_what_is_not_compiled() -> None:
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    with pytest.raises(TypeError, match="compile"):
        ef.wire_report(lowered)
    with pytest.raises(TypeError, match="compile"):
        ef.wire_report(lambda x: x)


def test_what_a_device_sends_and_receives() -> None:
    """Of 100 bytes among 4: in and out, a gather moves 3 messages, a reduction 6 quarters."""
    amounts = {kind: link_amount(kind, 4, 100) for kind in ("gather", "reduce", "all_to_all")}
    assert amounts == {"gather": 2 * 300, "reduce": 2 * 150, "all_to_all": 2 * 75}
    assert link_amount("permute", 4, 100) == link_amount("broadcast", 4, 100) == 2 * 100
