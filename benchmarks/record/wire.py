"""Part *wire*: bits, constants and compiled collectives of every codec."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ef_optax as ef
from benchmarks.record.modes import mesh_of
from benchmarks.record.names import public, two_shot
from tests.compressors.pool import CASES

WORKERS, AXIS = 4, "data"
SHAPES = ((), (1,), (37,), (6, 11), (600,), (4, 3, 5), (4096,), (256, 300))
LEAVES = {"bias": (7,), "kernel": (6, 11), "other": (6, 11), "large": (300, 256)}
"""What crosses in one exchange: equal leaves, and one too large to be stacked with others."""

EXCHANGES: dict[str, Callable[[], ef.Compressor]] = {
    "acp_sgd": lambda: ef.acp_sgd(2),
    "compose-cast-perm_k": lambda: ef.compose(ef.cast("bfloat16"), public("perm_k")(0)),
    "count_sketch": lambda: ef.count_sketch(3, 16, k=3),
    "dense": lambda: ef.dense(optax.scale(0.5)),
    "dgc_warmup": lambda: public("dgc_warmup")(0.1, 1, 2),
    "fcc": lambda: ef.fcc(ef.top_k(0.2), 2),
    "global_top_k": lambda: ef.global_top_k(0.2),
    "global_top_k_of_sum": lambda: public("global_top_k_of_sum")(0.2),
    "global_top_k_of_sum-tree": lambda: public("global_top_k_of_sum")(0.2, tree=True),
    "gradiveq": lambda: ef.gradiveq(0.5, samples=1, period=2, slice_size=2),
    "leader_top_k": lambda: public("leader_top_k")(0.2),
    "majority_vote": lambda: public("majority_vote")(),
    "per_leaf": lambda: ef.per_leaf(
        lambda path, like: ef.scaled_sign() if like.ndim > 1 else ef.identity()
    ),
    "perm_k": lambda: public("perm_k")(0),
    "power_sgd": lambda: ef.power_sgd(2),
    "scheduled": lambda: ef.scheduled([1], [ef.scaled_sign(), ef.top_k(0.2)]),
    "two_shot": lambda: two_shot(AXIS, ef.scaled_sign()),
    "two_shot-top_k": lambda: two_shot(AXIS, ef.top_k(0.2), ef.top_k(0.2)),
}
"""Compressors that travel in a way of their own, or that make others."""


def record() -> dict[str, Any]:
    """Asks all codecs, and compiles an exchange of each."""
    wall, cpu = time.perf_counter(), time.process_time()
    makers = {name: case.make for name, case in CASES.items()} | EXCHANGES
    with jax.numpy_dtype_promotion("strict"):
        codecs = {}
        for name, make in makers.items():
            codecs[name] = one(make)
            print(f"wire, {name}: {time.process_time() - cpu:.0f} s", flush=True)
    seconds = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }
    return {"codecs": codecs, "seconds": seconds}


def one(make: Callable[[], ef.Compressor]) -> dict[str, Any]:
    """What one compressor says and sends."""
    try:
        codec = make().codec
    except Exception as error:
        return {"refused": type(error).__name__}
    return {
        "bits": {str(shape): answer(lambda s=shape: codec.bits(s)) for shape in SHAPES},
        "bits of bfloat16": {
            str(shape): answer(lambda s=shape: codec.bits(s, jnp.bfloat16)) for shape in SHAPES
        },
        "traffic": {
            str(shape): answer(lambda s=shape: codec.traffic(s, jnp.float32, WORKERS))
            for shape in SHAPES
        },
        "alpha": {str(s): answer(lambda s=s: codec.alpha(s, WORKERS)) for s in SHAPES},
        "omega": {str(s): answer(lambda s=s: codec.omega(s, WORKERS)) for s in SHAPES},
        "collectives": answer(lambda: collectives(make())),
    }


def answer(ask: Callable[[], Any]) -> Any:
    """The answer as JSON keeps it, or the kind of error that it is refused with."""
    try:
        found = ask()
    except Exception as error:
        return f"refused: {type(error).__name__}"
    if isinstance(found, tuple):
        return [int(x) for x in found]
    return found if isinstance(found, list) or found is None else float(found)


def collectives(compressor: ef.Compressor) -> list[list[Any]]:
    """Kind, devices, bytes, whether conditional, and times of all collectives of one exchange."""
    mesh = mesh_of(AxisType.Auto, {AXIS: WORKERS})
    tx = ef.data_parallel(ef.compressed_mean(compressor, axis_name=AXIS), mesh, AXIS)
    params = {name: np.zeros(shape, np.float32) for name, shape in LEAVES.items()}
    like = jax.NamedSharding(mesh, P(AXIS))
    grads = {
        name: jax.ShapeDtypeStruct((WORKERS, *shape), jnp.float32, sharding=like)
        for name, shape in LEAVES.items()
    }
    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    found = ef.wire_report(compiled).collectives
    rows = [[c.kind, c.group_size, c.message_bytes, c.conditional, c.times] for c in found]
    return sorted(rows, key=str)
